"""Fixtures: a real engine behind a gateway, and vLLM's own server beside it with the same arguments."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.api.types import EngineInfo, ModelSpec
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.differential.cases import END_IDS, MODEL, VOCAB_SIZE
from tests.differential.peer import Peer, running_peer
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, bundle_of, running_cluster

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

MAX_MODEL_LEN = 2048
ENGINE = {
    "kv_cache_memory_bytes": 64 << 20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 128,
    "block_size": 32,
}


@dataclass(frozen=True)
class Served:
    """A started engine and the folder of the engine's model."""

    engine: VllmEngine
    info: EngineInfo
    folder: Path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny LLaMA checkpoint with sampling defaults and two end tokens."""
    folder = build_checkpoint("llama", tmp_path_factory.mktemp("differential"))
    defaults = json.loads((folder / "generation_config.json").read_text())
    assert defaults["temperature"] == pytest.approx(0.6)
    assert sorted(defaults["eos_token_id"]) == sorted(END_IDS)
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == VOCAB_SIZE
    return folder


@pytest.fixture(scope="session")
async def served(tiny_folder: Path) -> AsyncIterator[Served]:
    """The engine, which is started once for all tests of this folder."""
    spec = ModelSpec(MODEL, "unused", dtype="float32", max_model_len=MAX_MODEL_LEN, engine=ENGINE)
    engine = VllmEngine(spec, tiny_folder)
    try:
        yield Served(engine, await engine.start(), tiny_folder)
    finally:
        await engine.close()


@pytest.fixture
async def cluster(served: Served, tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Provide a gateway with a link to a worker that runs the engine."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(served.engine, bundle_of(served.folder), model=MODEL, info=served.info)
        yield cluster


@pytest.fixture(scope="module")
async def peer(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Peer]:
    """Start vLLM's own OpenAI server, unmodified, on the same checkpoint."""
    arguments = ENGINE | {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "load_format": "safetensors",
        "scheduling_policy": "priority",
        "enforce_eager": True,
        "disable_uvicorn_access_log": True,
    }
    async with running_peer(tiny_folder, arguments, tmp_path_factory.mktemp("peer") / "log") as peer:
        yield peer
