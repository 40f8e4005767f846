"""The output that a worker writes to Ray's files is also written to the output of the worker's container."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cluster.observe import output_copy
from cluster.observe.output_copy import FollowedFile, OutputCopy, copy_output

FIELDS = {"worker": "m-1", "pod": "gpu-0", "node": "ip-10-0-3-7", "gpu": "H100"}

PROGRAM = """
import os, sys
import structlog
from cluster.observe import log
from cluster.observe.line_writer import STDOUT
from cluster.observe.output_copy import copy_output
from cluster.worker.engine.processes.end_causes import file_of
fields = {"worker": "m-1"}
log.configure("info", fields, descriptor=STDOUT)
copy_output("/proc/%d/fd/1" % os.getppid(), fields, file_of)
structlog.get_logger("x").info("worker.ready")
os.system("echo INFO from a child >&2")
log.flush(60)
os._exit(0)
"""


@contextlib.contextmanager
def copying(files: dict[str, Path], target: int) -> Iterator[OutputCopy]:
    """Run a copy that begins at the present ends of the files, until the `with` block ends."""
    copy = OutputCopy({name: FollowedFile(path) for name, path in files.items()}, target, FIELDS)
    copy.start()
    try:
        yield copy
    finally:
        copy.stop()


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file as JSON objects."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_own_lines_are_kept_and_others_are_wrapped(tmp_path: Path) -> None:
    """Lines that are appended to a worker's output files are copied once and in order. A line of Headrace's log is
    copied unchanged. Any other line becomes the field `text` of an event that describes the worker. Ray's marks are not
    copied, nor are lines from before the copy began."""
    out, err, copied = tmp_path / "out", tmp_path / "err", tmp_path / "copied"
    out.write_text('{"event": "worker.ready", "old": true}\n')
    err.touch()
    target = os.open(copied, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK)
    with copying({"stdout": out, "stderr": err}, target) as copy:
        with out.open("a") as file:
            file.write(':actor_name:Worker\n{"event": "worker.ready"}\n\n{"no event"\n')
        assert copy.flush(60.0)
        with err.open("a") as file:
            file.write("half a")
        assert copy.flush(60.0)
        with err.open("a") as file:
            file.write(" line\n")
        assert copy.flush(60.0)
    ours, broken, whole = lines(copied)
    assert ours == {"event": "worker.ready"}
    assert (broken["event"], broken["text"], broken["stream"]) == ("worker.output", '{"no event"', "stdout")
    assert {name: whole[name] for name in FIELDS} == FIELDS
    assert (whole["text"], whole["stream"]) == ("half a line", "stderr")
    os.close(target)


def test_a_replaced_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    """After a rotation the new file is read from its beginning, and so is a file that was truncated."""
    path = tmp_path / "out"
    path.write_text("before\n")
    file = FollowedFile(path)
    path.rename(tmp_path / "out.1")
    path.write_text("new\n")
    assert file.pop_lines() == ([b"new"], 0)
    path.write_text("b\n")
    assert file.pop_lines() == ([b"b"], 0)
    path.unlink()
    assert file.pop_lines() == ([], 0)


def test_a_copy_far_behind_skips_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reader is too far behind, it continues near the end of the file with a whole line, and reports the number
    of skipped bytes."""
    monkeypatch.setattr(output_copy, "MAX_LAG_BYTES", 10_000)
    monkeypatch.setattr(output_copy, "CHUNK_BYTES", 1000)
    path = tmp_path / "out"
    path.touch()
    file = FollowedFile(path)
    path.write_text("".join(f"{number:09}\n" for number in range(5000)))
    some, skipped = file.pop_lines()
    assert skipped == 49_000
    assert some[0] == b"000004901"
    assert some[-1] == b"000004999"


def test_an_output_that_takes_nothing_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """If no process reads the output, `flush` returns False after its time limit."""
    path = tmp_path / "out"
    path.touch()
    reader, target = os.pipe()
    os.set_blocking(target, False)
    copy = OutputCopy({"stdout": FollowedFile(path)}, target, FIELDS)
    path.write_text("x" * 99 + "\n" + "".join("y" * 99 + "\n" for _ in range(5000)))
    assert not copy.flush(0.01)
    os.close(reader)
    os.close(target)


def test_an_output_that_cannot_be_opened_is_logged(tmp_path: Path) -> None:
    """If the path for the copy cannot be opened, the error is logged and not raised.

    Nothing is copied if no path is set, or if the process does not write its output to a file.
    """
    out = tmp_path / "out"
    out.touch()
    assert copy_output("", FIELDS, lambda number: str(out)) is None
    assert copy_output(str(tmp_path / "absent"), FIELDS, lambda number: "") is None
    with capture_logs() as logs:
        assert copy_output(str(tmp_path / "absent"), FIELDS, lambda number: str(out)) is None
    assert [entry["event"] for entry in logs] == ["log.copy_failed"]


def test_a_worker_writes_to_the_output_of_its_container(tmp_path: Path) -> None:
    """If Ray has redirected a process's output to files, the lines of the process and its children also reach the
    container's standard output, even if the process ends at once."""
    (tmp_path / "worker.py").write_text(PROGRAM)
    script = f"{sys.executable} {tmp_path}/worker.py >>{tmp_path}/out 2>>{tmp_path}/err; true"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=True)
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["event"] for line in got} == {"worker.ready", "worker.output"}
    assert [line["text"] for line in got if line["event"] == "worker.output"] == ["INFO from a child"]
    assert all(line["worker"] == "m-1" for line in got)
    assert "worker.ready" in (tmp_path / "out").read_text()
    assert "INFO from a child" in (tmp_path / "err").read_text()
