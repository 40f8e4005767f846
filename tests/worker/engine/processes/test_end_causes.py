"""When an engine ends, the reported error is the error of the process that failed first."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.ports import EngineDead
from cluster.worker.engine.processes import end_causes, exit_status, sockets
from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.engine import VllmEngine
from tests.worker.engine.conftest import tiny_spec


@pytest.fixture(autouse=True)
def no_keepers() -> Iterator[None]:
    """Remove the log handlers that a test has added."""
    yield
    for name in end_causes.LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, end_causes._NotesHandler)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an engine's sockets, set in the environment."""
    folder = tmp_path / f"{sockets.PREFIX}1"
    folder.mkdir()
    monkeypatch.setenv(sockets.ENV, str(folder))
    monkeypatch.setenv(end_causes.ENGINE, "e1")
    return folder


def fail(name: str, error: Exception) -> None:
    """Log an error as a failing vLLM process does."""
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception("EngineCore encountered a fatal error.")


def test_the_first_error_counts(folder: Path) -> None:
    """If a rank fails and then the engine core fails, the rank's error is reported as the cause. Errors of one engine
    are not reported for another engine."""
    end_causes.register()
    end_causes.register()
    fail("vllm.v1.executor.multiproc_executor", MemoryError("a rank\nhas no room"))
    fail("vllm.v1.engine.core", RuntimeError("see above"))
    assert end_causes.find_cause("e1") == "MemoryError: a rank has no room"
    with end_causes.name_engine() as other:
        assert end_causes.find_cause(other) == ""
    assert os.environ[end_causes.ENGINE] == "e1", "the next Ray must not inherit the name"
    assert end_causes.find_cause("e1")


def test_a_process_that_only_imports_ray_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a process that has only imported Ray is empty, and the lookup of the name does not start Ray."""
    asked: list[str] = []
    imported = SimpleNamespace(is_initialized=lambda: False, get_runtime_context=lambda: asked.append("context"))
    monkeypatch.setitem(sys.modules, "ray", imported)
    assert end_causes.process_name() == ""
    assert not asked


def write(folder: Path, *notes: end_causes.Note) -> None:
    """Write notes of errors and ends into a file in `folder`, as an engine's processes do, and add some invalid lines
    at the end of the file."""
    lines = [json.dumps(dataclasses.asdict(note)) for note in notes]
    (folder / f"{end_causes.NOTES}-e1").write_text("\n".join([*lines, "{", "[]", '{"at": 1}', ""]))


kinds = st.sampled_from(["error", "killed", "ended"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(kinds, st.floats(0, 100)), max_size=6))
def test_a_rank_that_was_killed_comes_before_the_errors_that_follow(
    folder: Path, notes: list[tuple[str, float]]
) -> None:
    """A killed rank is the cause of an engine's end, even if errors were noted up to a second before the kill.
    Reason: the other ranks fail as soon as one rank is missing, and may log their errors before the kill is
    noticed.

    Without a killed rank, the first error is the cause. Exit codes count only if there is neither an error nor a
    killed rank.
    """
    notes.sort(key=lambda note: note[1])
    write(folder, *(end_causes.Note(at, kind, f"{kind} {number}", "/log") for number, (kind, at) in enumerate(notes)))
    first = {kind: number for number, (kind, _) in reversed(list(enumerate(notes)))}
    expected = "error" if "error" in first else "killed" if "killed" in first else "ended"
    if {"error", "killed"} <= first.keys() and notes[first["killed"]][1] <= notes[first["error"]][1] + 1:
        expected = "killed"
    if expected == "ended" and notes:
        assert end_causes.find_cause("e1").startswith("ended 0")
    else:
        assert end_causes.find_cause("e1") == (f"{expected} {first[expected]}; log: /log" if notes else "")


def test_old_errors_do_not_explain_a_new_end(folder: Path) -> None:
    """If an engine ends, errors from an hour ago, such as the error of one request, are not reported as the cause."""
    write(folder, end_causes.Note(time.time() - 3600, "error", "old"), end_causes.Note(time.time(), "ended", "new"))
    assert end_causes.find_cause("e1", recent=True) == "new"
    assert end_causes.find_cause("e1") == "old"


def test_executors_words_for_ended_ranks_are_kept(folder: Path) -> None:
    """When vLLM's executor logs that a rank has ended, the cause is recorded: for a process, its signal or exit code;
    for Ray actors, the numbers of their ranks."""
    end_causes.register()
    logger = logging.getLogger("vllm.v1.executor.multiproc_executor")
    logger.error("Worker proc %s died unexpectedly (exit code: %s), shutting down.", "VllmWorker-1", -11)
    assert end_causes.find_cause("e1") == "rank 1 was killed by SIGSEGV"
    with end_causes.name_engine() as other:
        logger.error("RayWorkerProc rank=%s died unexpectedly, shutting down executor.", [3])
    assert end_causes.find_cause(other) == "rank 3 ended without a word"


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("VllmWorker-3", "rank 3"),
        ("vllm_Worker_a1_TP1", "rank 1"),
        ("vllm_Worker_a1_TP0_PP1", "rank TP0 PP1"),
        ("", ""),
    ],
)
def test_ranks_have_their_numbers(name: str, rank: str) -> None:
    """The name of a rank is derived from the name of its process or actor."""
    assert end_causes._rank(name) == rank


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
        (0, "ended with exit code 3"),
    ],
)
def test_a_core_notes_how_other_processes_end(folder: Path, number: int, how: str) -> None:
    """An engine core records how a process that is not its child has ended, and the path of that process's log."""
    command = "read line; exit 3"
    with subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE) as process:
        member = end_causes.Member("rank 1", "/var/log/rank-1.out")
        (folder / f"{end_causes.MEMBER}-e1-{process.pid}").write_text(json.dumps(dataclasses.asdict(member)))
        (folder / f"{end_causes.MEMBER}-e1-1x").write_text("{")
        members = end_causes.Members()
        members.wait(0.01)
        assert end_causes.find_cause("e1") == ""
        if number:
            process.send_signal(number)
        else:
            process.communicate(b"\n")
        members.wait(60.0)
        assert end_causes.find_cause("e1") == f"rank 1 (process {process.pid}) {how}; log: /var/log/rank-1.out"


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("vllm.v1.engine.core", "EngineCore encountered a fatal error."),
        ("vllm.v1.executor.ray_executor_v2", "RayWorkerProc rank=[1] died unexpectedly, shutting down executor."),
    ],
)
def test_a_core_waits_with_its_own_error_for_a_ranks_end(folder: Path, logger: str, message: str) -> None:
    """An engine core records the end of a rank before its own error. Otherwise the core's error would be reported as
    the cause."""
    members = end_causes.Members()
    end_causes.register(members)
    with subprocess.Popen(["sleep", "60"]) as process:
        member = end_causes.Member("rank 1")
        (folder / f"{end_causes.MEMBER}-e1-{process.pid}").write_text(json.dumps(dataclasses.asdict(member)))
        members.wait(0.01)
        logs = threading.Thread(
            target=logging.getLogger(logger).error,
            args=(message,),
            kwargs={"exc_info": RuntimeError("Executor failed.")},
        )
        logs.start()
        process.kill()
        members.wait(60.0)
        logs.join()
        first = (folder / f"{end_causes.NOTES}-e1").read_text().splitlines()[0]
        assert json.loads(first)["text"] == f"rank 1 (process {process.pid}) was killed by SIGKILL"


def test_a_core_waits_longer_for_a_rank_that_is_seen_to_end(folder: Path) -> None:
    """A core waits longer for a rank that is ending, which may take time on a busy machine, than for a rank that runs
    on."""
    members = end_causes.Members()
    with subprocess.Popen(["sleep", "60"]) as process:
        (folder / f"{end_causes.MEMBER}-e1-{process.pid}").write_text(
            json.dumps(dataclasses.asdict(end_causes.Member("rank 1")))
        )
        members.wait(0.01)
        began = time.monotonic()
        members.settle(0.01)
        assert time.monotonic() - began < end_causes.ENDING_S / 2
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # the process has ended and its end is not noted yet
        waiting = threading.Thread(target=members.settle, args=(0.01,))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        members.wait(60.0)
        waiting.join(60.0)
        assert not waiting.is_alive()
        assert "was killed by SIGKILL" in end_causes.find_cause("e1")


def test_a_core_without_ranks_does_not_wait(folder: Path) -> None:
    """An engine core without rank processes notes its error at once."""
    end_causes.register(end_causes.Members())
    fail("vllm.v1.engine.core", RuntimeError("alone"))
    assert end_causes.find_cause("e1") == "RuntimeError: alone"


def test_a_crash_is_read_from_the_log_where_the_kernel_tells_nothing(tmp_path: Path) -> None:
    """If the kernel gives no exit status, the last crash message in a process's log is the cause of its end."""
    log = tmp_path / "rank.err"
    log.write_text("x" * 100_000 + "\n*** SIGSEGV received at time=1 on cpu 0 ***\nFatal Python error: Aborted\n\n")
    assert end_causes._crash_cause(end_causes.Member("rank 1", "", str(log))) == "crashed: Aborted"
    log.write_text("*** SIGBUS received at time=1 on cpu 0 ***\n")
    assert end_causes._crash_cause(end_causes.Member("rank 1", str(log), "/no/such")) == "was killed by SIGBUS"
    log.write_text("nothing")
    assert end_causes._crash_cause(end_causes.Member("rank 1", str(log), str(log))) == ""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "was killed by SIGKILL"),
        (-99, "was killed by signal 99"),
        (7, "ended with exit code 7"),
        (None, exit_status.UNKNOWN),
    ],
)
def test_exit_codes_are_said_in_words(code: int | None, words: str) -> None:
    """Python's exit codes are described in words. A negative exit code is a signal."""
    assert exit_status.describe(code) == words


def test_nothing_is_written_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause of an engine's end is written only into a socket folder of Headrace. If the environment variable names
    any other folder, or a folder that does not exist, nothing is written."""
    end_causes.register()
    for place in (tmp_path, tmp_path / f"{sockets.PREFIX}2"):
        monkeypatch.setenv(sockets.ENV, str(place))
        fail("vllm.v1.engine.core", RuntimeError("no"))
        assert end_causes.find_cause("e1") == ""
    assert not list(tmp_path.iterdir())


def test_an_error_from_another_process_is_told_without_its_traceback() -> None:
    """The traceback that Ray or vLLM's ranks add to an error is removed. All lines of the message are kept."""
    why = "ValueError: no route\nto the other rank"
    sent = f"ray::RayWorkerProc.initialize_worker()\nTraceback (most recent call last):\n  File x\n    call()\n{why}"
    assert end_causes.one_line(RuntimeError(sent)) == "ValueError: no route to the other rank"
    noted = ValueError("no route\nto the other rank")
    noted.add_note("Traceback (most recent call last):\n  File y\nValueError: no route")
    assert end_causes.one_line(noted) == "ValueError: no route to the other rank"
    assert len(end_causes.one_line(ValueError("long " * 1000))) == end_causes.LONGEST
    died = "The actor died unexpectedly before finishing this task.\n\tclass_name: A\n\tpid: 7867\n\tip: 1.2.3.4\nThe"
    assert end_causes.one_line(RuntimeError(died)) == "a rank (process 7867) died while it started"


@pytest.mark.engine
@pytest.mark.parametrize(
    ("rank", "cache_bytes", "why"),
    [
        ("core", 1 << 12, "No available memory for the cache blocks"),
        pytest.param("process", 1 << 60, "Available memory on node", marks=pytest.mark.long),
    ],
)
async def test_a_real_engine_says_why(
    llama_folder: Path, rank: str, cache_bytes: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an engine core or a rank fails at its start, the error has the reason and the name of the catalog entry."""
    monkeypatch.setenv(lone_rank.RANK, rank)
    spec = tiny_spec()
    spec = dataclasses.replace(spec, engine={**spec.engine, "kv_cache_memory_bytes": cache_bytes})
    with pytest.raises(
        EngineDead, match=rf"models\[{spec.name}\]: the engine did not come up: (rank 0: )?ValueError: {why}"
    ):
        await VllmEngine(spec, llama_folder).start()
