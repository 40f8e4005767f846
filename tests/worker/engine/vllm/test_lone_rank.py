"""A single rank on CPUs runs in the process of the engine core, and its threads are bound to CPUs as in vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.engine.vllm.private_names import missing
from tests.worker.engine.conftest import engine_children, tiny_spec


def config(ranks: int, device: str = "cpu") -> SimpleNamespace:
    """Return the part of vLLM's configuration that `settle` reads."""
    parallel = SimpleNamespace(world_size_across_dp=ranks, distributed_executor_backend="mp")
    return SimpleNamespace(parallel_config=parallel, device_config=SimpleNamespace(device_type=device))


@pytest.mark.parametrize(("ranks", "word", "device", "there"), [
    (1, "", "cpu", True), (1, "core", "cpu", True), (1, "process", "cpu", False),
    (2, "core", "cpu", False), (1, "core", "cuda", False),
])  # fmt: skip
def test_which_engines(ranks: int, word: str, device: str, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank on CPUs runs in the process of the engine core. With HEADRACE_ENGINE_RANK=process, the rank gets a
    process of its own."""
    monkeypatch.setenv(lone_rank.RANK, word)
    settled = config(ranks, device)
    assert lone_rank.settle(settled) is there
    assert settled.parallel_config.distributed_executor_backend == ("uni" if there else "mp")


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of HEADRACE_ENGINE_RANK other than `core` and `process` is refused. The error names these two values."""
    monkeypatch.setenv(lone_rank.RANK, "thread")
    with pytest.raises(ValueError, match="HEADRACE_ENGINE_RANK='thread': use core or process"):
        lone_rank.settle(config(1))


def test_this_vllm_has_what_it_needs() -> None:
    """The installed vLLM has every private name that lone_rank.py uses. If a name were missing, the rank would run in a
    process of its own, without an error."""
    assert not missing(lone_rank.SYMBOLS)


@pytest.mark.engine
@pytest.mark.parametrize("bind", [pytest.param("nobind", marks=pytest.mark.long), "0"])
async def test_an_engine_is_one_process(llama_folder: Path, bind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with one rank runs the rank inside the core's process. If VLLM_CPU_OMP_THREADS_BIND names a CPU
    core, the threads are bound to it.

    The environment variables of the process that starts the engine are unchanged.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    me = psutil.Process()
    before, variables = engine_children(me), {name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_"))}
    engine = VllmEngine(tiny_spec(), llama_folder)
    await engine.start()
    try:
        (core,) = [child for child in engine_children(me) if child not in before]
        assert not engine_children(core)
        env = {name: value for name, value in core.environ().items() if name.startswith(("OMP_", "GOMP_"))}
        assert (env.get("OMP_NUM_THREADS"), env.get("OMP_PLACES") or env.get("GOMP_CPU_AFFINITY")) in (
            [(None, None)] if bind == "nobind" else [("1", "{0}"), ("1", "0")]
        )
    finally:
        await engine.close()
    assert {name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_"))} == variables
