"""An engine that does not come up says why, in the words of whichever of its processes failed first."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api.ports import EngineDead
from cluster.engine import causes, lone_rank, sockets
from cluster.engine.vllm_engine import VllmEngine
from tests.engine.conftest import tiny_spec


@pytest.fixture(autouse=True)
def no_keepers() -> Iterator[None]:
    """This process's loggers are as they were."""
    yield
    for name in causes.LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [one for one in logger.handlers if not isinstance(one, causes._Keeper)]


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


def test_an_error_from_another_process_is_told_without_its_traceback() -> None:
    """Ray sends the whole traceback along, vLLM's ranks add it as a note; all lines of the message are told."""
    why = "ValueError: no route\nto the other rank"
    sent = f"ray::RayWorkerProc.initialize_worker()\nTraceback (most recent call last):\n  File x\n    call()\n{why}"
    assert causes.text(RuntimeError(sent)) == "ValueError: no route to the other rank"
    noted = ValueError("no route\nto the other rank")
    noted.add_note("Traceback (most recent call last):\n  File y\nValueError: no route")
    assert causes.text(noted) == "ValueError: no route to the other rank"
    assert len(causes.text(ValueError("long " * 1000))) == causes.LONGEST


@pytest.mark.engine
@pytest.mark.parametrize(
    ("rank", "cache_bytes", "why"),
    [("core", 1 << 12, "No available memory for the cache blocks"), ("process", 1 << 60, "Available memory on node")],
)
async def test_a_real_engine_says_why(
    llama_folder: Path, rank: str, cache_bytes: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache too small for the longest request ends the core, one larger than the machine its rank: the reason is in
    the error, with the entry's name."""
    monkeypatch.setenv(lone_rank.RANK, rank)
    spec = tiny_spec()
    spec = dataclasses.replace(spec, engine={**spec.engine, "kv_cache_memory_bytes": cache_bytes})
    with pytest.raises(EngineDead, match=rf"models\[{spec.name}\]: the engine did not come up: ValueError: {why}"):
        await VllmEngine(spec, llama_folder).start()
