"""Log lines are JSON objects with the fields of their process. A slow output never makes a caller wait."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import logging.config
import logging.handlers
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import structlog

from cluster.observe import log
from cluster.observe.line_writer import LineWriter

PROGRAM = """
import structlog
from cluster.observe import log
log.CONFIGURE
structlog.get_logger("x").info("part.began", text="x" * 10_000, size=3)
try:
    raise ValueError("why")
except ValueError:
    structlog.get_logger("x").exception("part.failed")
"""


def lines_of(configure: str, **environment: str) -> list[dict[str, Any]]:
    """Run a program that logs to standard error, and return its lines. `configure`: the program's call that configures
    the log."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("CONFIGURE", configure)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env={**os.environ, **environment},
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_a_line_is_json_with_the_fields_of_its_process() -> None:
    """Each line is a JSON object with the time in UTC, the level, the event, and the fields of the event and of the
    process. Long texts are cut, and an exception is one field. All lines are written even if the process ends at
    once."""
    began, failed = lines_of("configure('info', {'cluster': 'c', 'part': 'gateway'})")
    assert (began["cluster"], began["part"], began["event"], began["level"]) == ("c", "gateway", "part.began", "info")
    assert began["timestamp"].endswith("Z")
    assert began["size"] == 3
    assert len(began["text"]) < 8300
    assert began["text"].endswith("(10000 characters)")
    assert failed["level"] == "error"
    assert "ValueError: why" in failed["exception"]


def test_any_value_of_a_field_is_rendered() -> None:
    """A field value that JSON does not support is written as text. An event that contains itself still gets a line."""
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    reader, output = os.pipe()
    before = structlog.get_config()
    writer = log.configure("info", {"part": "gateway"}, descriptor=output)
    try:
        logger = structlog.get_logger("test")
        logger.info("part.began", path=Path("/x"), size=float("inf"))
        logger.info("part.looped", value=loop)
        assert writer.flush(60.0)
        began, looped = map(json.loads, os.read(reader, 65_536).splitlines())
        assert "/x" in began["path"]
        assert (looped["event"], looped["part"]) == ("part.looped", "gateway")
    finally:
        structlog.configure(**before)
        os.close(reader)


def test_a_child_process_logs_as_its_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child process that calls `configure_as_parent` logs with the level and fields of its parent. Without a parent's
    settings, the call does nothing."""
    settings = json.dumps({"level": "error", "descriptor": 2, "fields": {"part": "worker", "pod": "gpu-0"}})
    (failed,) = lines_of("configure_as_parent()", HEADRACE_LOG_SETTINGS=settings)
    assert (failed["event"], failed["part"], failed["pod"]) == ("part.failed", "worker", "gpu-0")
    monkeypatch.delenv("HEADRACE_LOG_SETTINGS", raising=False)
    log.configure_as_parent()


def writer_to(output: int, max_bytes: int = 1 << 20) -> LineWriter:
    """Return a writer of plain lines. It reports dropped lines as `dropped NUMBER`."""
    return LineWriter(
        output,
        render=lambda event: str(event["line"]),
        dropped_event=lambda dropped: {"line": f"dropped {dropped}"},
        max_bytes=max_bytes,
    )


def test_a_full_output_never_makes_a_caller_wait() -> None:
    """While the output is not read, lines wait up to the bound, and further lines are dropped. When the output is read
    again, the waiting lines arrive whole and in order. Each line is either written or counted as dropped."""
    reader, output = os.pipe()
    fcntl.fcntl(output, fcntl.F_SETPIPE_SZ, 4096)
    writer = writer_to(output, max_bytes=100_000)
    for number in range(1000):
        writer.write({"line": f"line {number} {'x' * 90}"})
    assert writer.dropped > 700
    assert not writer.flush(0.01)
    got: list[bytes] = []

    def counts() -> tuple[list[int], int]:
        """Return the numbers of the lines that were read, and the number of lines that were reported as dropped."""
        whole = b"".join(got).decode().split("\n")[:-1]
        numbers = [int(line.split()[1]) for line in whole if line.startswith("line ")]
        return numbers, sum(int(line.split()[1]) for line in whole if line.startswith("dropped "))

    def read_all() -> None:
        while len(counts()[0]) + counts()[1] < 1000:
            got.append(os.read(reader, 65_536))

    reading = threading.Thread(target=read_all)
    reading.start()
    assert writer.flush(60.0)
    reading.join(60.0)
    numbers, dropped = counts()
    assert numbers == list(range(len(numbers)))
    assert dropped == writer.dropped == 1000 - len(numbers)
    os.close(reader)
    os.close(output)


def test_a_failing_output_loses_lines_and_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the output fails, for example because the disk is full, lines are dropped and counted. When the output
    works again, new lines are written."""
    monkeypatch.setattr("cluster.observe.line_writer.PAUSE_S", 0.001)
    file = tmp_path / "log"
    output = os.open("/dev/full", os.O_WRONLY)
    writer = writer_to(output)
    writer.write({"line": "lost"})
    assert writer.flush(60.0)
    assert writer.dropped == 1
    working = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(working, output)
    writer.write({"line": "kept"})
    assert writer.flush(60.0)
    assert file.read_text() == "kept\ndropped 1\n"
    os.close(working)
    os.close(output)


def test_a_forked_process_writes_its_own_lines() -> None:
    """A forked process writes its own lines, and not its parent's lines. No lock that the parent held blocks it."""
    reader, output = os.pipe()
    writer = writer_to(output)
    writer.write({"line": "parent"})
    assert writer.flush(60.0)
    child = os.fork()
    if not child:
        writer.write({"line": "child"})
        os._exit(0 if writer.flush(60.0) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 1000) == b"parent\nchild\n"
    os.close(reader)
    os.close(output)


async def test_calls_have_their_own_fields() -> None:
    """`call_fields` returns the fields of the call that the current task serves, even while other calls run. Outside of
    calls it returns nothing."""

    async def run(name: str) -> bool:
        with log.CallFields(log.ids_of_call(name, "")):
            await asyncio.sleep(0)
            return log.call_fields() == {"request_id": name}

    assert all(await asyncio.gather(*map(run, "abc")))
    assert log.call_fields() == {}
    assert log.ids_of_call("r", "t") == {"request_id": "r", "trace_id": "t"}


def test_a_kept_logger_outlives_dict_config(tmp_path: Path) -> None:
    """A call of logging.config.dictConfig closes the handlers of a logger, except for a logger that was passed
    to `keep_handlers_open`.

    As in Ray Serve, the kept logger writes through a memory handler to a file, and still does so after the
    call.
    """
    loggers = [logging.getLogger(name) for name in ("test.kept", "test.not_kept")]
    buffers = []
    for logger in loggers:
        target = logging.FileHandler(tmp_path / logger.name)
        buffers.append(logging.handlers.MemoryHandler(100, target=target))
        logger.addHandler(buffers[-1])
    kept, other = buffers
    log.keep_handlers_open(loggers[0])
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
    assert (kept.target is None, other.target is None) == (False, True)
    loggers[0].error("still written")
    kept.flush()
    assert "still written" in (tmp_path / "test.kept").read_text()
    for logger, buffer in zip(loggers, buffers, strict=True):
        logger.removeHandler(buffer)
