"""Fixtures for real engines on a tiny checkpoint.

The engines are started once per session and shared, since a start takes tens of seconds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.api.types import ModelSpec
from cluster.worker.engine.processes import fork_server, sockets
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.support.checkpoints import build_checkpoint
from tests.worker.engine.contract import Subject

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

DEADLINE_S = 280.0 if os.environ.get("TRITON_INTERPRET") == "1" else 60.0
"""Time limit in seconds for the requests of one test. Interpreted kernels take twenty times as long."""
TOKEN_LO, TOKEN_HI = 300, 700
"""Range of ordinary ids in the tiny tokenizer, above its bytes and special tokens."""


def tiny_spec(**changes: object) -> ModelSpec:
    """Return a catalog entry for the tiny checkpoint of the tests, with few slots, prefill chunks of 128 tokens and
    small KV blocks. `changes`: other fields of the entry."""
    engine = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 128, "block_size": 32}
    base: dict[str, object] = {"dtype": "float32", "max_model_len": 1024, "engine": engine}
    return ModelSpec("tiny", "unused", **(base | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama checkpoint."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def schedules_asynchronously(subject: Subject) -> bool:
    """Return whether an engine on the fast path schedules asynchronously.

    On CPUs only the tests' plugin enables asynchronous scheduling.
    """
    engine: Any = subject.engine
    return bool(engine._path._core.vllm_config.scheduler_config.async_scheduling)


def engine_children(process: psutil.Process) -> list[psutil.Process]:
    """Return the living engine cores if `process` is this test process, else the living ranks; `process` is then an
    engine core. They are children of `process` or forks of the fork server. Zombies are left out, since they belong to
    other tests."""
    name = "EngineCore" if process.pid == os.getpid() else "Worker"
    servers = [psutil.Process(pid) for pid in fork_server.server_pids()]
    children = [child for parent in (process, *servers) for child in parent.children()]
    living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if name in " ".join(child.cmdline())]


def left_by_vllm() -> set[Path]:
    """Return the rendezvous files that vLLM itself creates for ranks."""
    return set(Path(tempfile.gettempdir()).glob("vllm_dist_*"))


async def _started(folder: Path, *, prefer_fastpath: bool) -> AsyncIterator[tuple[Subject, psutil.Process]]:
    me = psutil.Process()
    before, temporary = engine_children(me), left_by_vllm()
    engine = VllmEngine(tiny_spec(), folder, prefer_fastpath=prefer_fastpath)
    info = await engine.start()
    (core,) = [child for child in engine_children(me) if child not in before]
    family = [core, *core.children(recursive=True)]
    try:
        yield Subject(engine, info, TOKEN_LO, TOKEN_HI, DEADLINE_S), core
        folder = Path(os.environ[sockets.ENV])
        assert any(file.is_socket() for file in folder.iterdir()), "vLLM's sockets are in this process's own folder"
        assert any(file.name.startswith("meeting-") for file in folder.iterdir()), "and so is the rendezvous file"
    finally:
        await engine.close()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 60)
    assert not alive, "close left processes of the engine"
    assert left_by_vllm() <= temporary, "close left files of the engine"


@pytest.fixture(scope="session")
async def fast_engine(llama_folder: Path) -> AsyncIterator[tuple[Subject, psutil.Process]]:
    """A started engine on the fast path, and the process of its core."""
    async for started in _started(llama_folder, prefer_fastpath=True):
        yield started


@pytest.fixture(scope="session")
def fast_subject(fast_engine: tuple[Subject, psutil.Process]) -> Subject:
    """Return a started engine on the fast path."""
    return fast_engine[0]


@pytest.fixture(scope="session")
def fast_core(fast_engine: tuple[Subject, psutil.Process]) -> psutil.Process:
    """The process of the engine core of `fast_subject`."""
    return fast_engine[1]


@pytest.fixture(scope="session")
async def public_subject(llama_folder: Path) -> AsyncIterator[Subject]:
    """A started engine that serves through AsyncLLM."""
    async for subject, _ in _started(llama_folder, prefer_fastpath=False):
        yield subject
