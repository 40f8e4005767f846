"""An engine that does not come up says why, in the words of whichever of its processes failed first."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from cluster.api.ports import EngineDead
from cluster.engine import causes, lone_rank, sockets
from cluster.engine.vllm_engine import VllmEngine
from tests.engine.conftest import tiny_spec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sockets' folder of an engine."""
    folder = tmp_path / f"{sockets.PREFIX}1"
    folder.mkdir()
    monkeypatch.setenv(sockets.ENV, str(folder))
    return folder


def fail(name: str, error: Exception) -> None:
    """Log an error as vLLM's processes do when they fail."""
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception("EngineCore failed to start.")


def test_the_first_error_is_told_once(folder: Path) -> None:
    """A rank's own error, not the core's about the rank; told, it is forgotten."""
    causes.keep()
    causes.keep()
    fail("vllm.v1.executor.multiproc_executor", MemoryError("a rank\nhas no room"))
    fail("vllm.v1.engine.core", RuntimeError("see above"))
    assert causes.take() == "MemoryError: a rank has no room"
    assert causes.take() == ""
    assert not list(folder.iterdir())


def test_nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that is not ours gets no file, and neither does a folder that is not there."""
    causes.keep()
    for place in (tmp_path, tmp_path / f"{sockets.PREFIX}2"):
        monkeypatch.setenv(sockets.ENV, str(place))
        fail("vllm.v1.engine.core", RuntimeError("no"))
        assert causes.take() == ""
    assert not list(tmp_path.iterdir())


def test_an_error_from_another_process_is_its_last_line() -> None:
    """Ray sends the whole traceback along."""
    sent = "ray::RayWorkerProc.initialize_worker()\nTraceback (most recent call last):\n  File x\nValueError: no route"
    assert causes.text(RuntimeError(sent)) == "ValueError: no route"
    assert len(causes.text(ValueError("long " * 1000))) == causes.LONGEST


@pytest.mark.engine
@pytest.mark.parametrize("rank", ["core", "process"])
async def test_a_real_engine_says_why(llama_folder: Path, rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache too small for one request of the longest length: the reason is in the error, with the entry's name."""
    monkeypatch.setenv(lone_rank.RANK, rank)
    spec = tiny_spec()
    engine = VllmEngine(
        dataclasses.replace(spec, engine={**spec.engine, "kv_cache_memory_bytes": 1 << 12}), llama_folder
    )
    with pytest.raises(EngineDead, match=rf"models\[{spec.name}\]: the engine did not come up: .*cache blocks"):
        await engine.start()
