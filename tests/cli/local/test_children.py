"""Child processes are restarted after they have died and are stopped on request. The tests use real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.cli.local.children import HEALTHY_S, LONGEST_PAUSE_S, Backoff, Child, keep_alive

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
open({ready!r}, "w").close()
time.sleep(600)
"""


def child(program: str, log: Path) -> Child:
    """Return a child that runs a Python program and writes to a log file."""
    return Child("part", [sys.executable, "-c", program], dict(os.environ), log)


@given(st.lists(st.floats(0, 2 * HEALTHY_S), max_size=30))
def test_the_pause_grows_to_its_bound_and_forgets_after_health(lives: list[float]) -> None:
    """The pause before a restart doubles up to a maximum, and is reset after a process was healthy."""
    backoff = Backoff(1.0)
    expected = 1.0
    for lived in lives:
        expected = 1.0 if lived >= HEALTHY_S else expected
        assert backoff.after(lived) == expected
        expected = min(expected * 2, LONGEST_PAUSE_S)


async def test_a_dead_part_is_started_again_and_told(tmp_path: Path) -> None:
    """The death of a child is reported with the cause and the log file, and a new process is started."""
    part = child("import time; print('up', flush=True); time.sleep(600)", tmp_path / "log")
    await part.start()
    reports: list[str] = []
    restarted: asyncio.Queue[int | None] = asyncio.Queue()

    async def restart() -> None:
        await part.start()
        restarted.put_nowait(part.pid)

    watch = asyncio.create_task(keep_alive(part, restart, reports.append, Backoff(0.01)))
    first = part.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    second = await asyncio.wait_for(restarted.get(), 60)
    assert second not in (None, first)
    assert "part ended (signal SIGKILL)" in reports[0]
    assert str(tmp_path / "log") in reports[0]
    watch.cancel()
    await part.stop(0.0)
    assert part.pid is None


async def test_a_failing_restart_is_tried_again(tmp_path: Path) -> None:
    """A failed restart of a child is reported, and the restart is tried again."""
    part = child("raise SystemExit(7)", tmp_path / "log")
    await part.start()
    reports: list[str] = []
    tries: asyncio.Queue[int] = asyncio.Queue()

    async def restart() -> None:
        tries.put_nowait(1)
        if tries.qsize() == 1:
            raise OSError("no port")
        await part.start()

    watch = asyncio.create_task(keep_alive(part, restart, reports.append, Backoff(0.01)))
    for _ in range(2):
        await asyncio.wait_for(tries.get(), 60)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    await part.stop(1.0)
    assert "part ended (exit code 7)" in reports[0]
    assert reports[1] == "part did not start: no port"


async def test_a_stubborn_part_is_killed(tmp_path: Path) -> None:
    """A child that ignores SIGTERM is killed, and the end of the child's log can still be read."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    part = child(STUBBORN.format(ready=str(ready)), tmp_path / "log")
    await part.start()
    async with asyncio.timeout(60):
        await asyncio.to_thread(ready.read_text)
    await part.stop(0.05)
    assert await part.wait() == -signal.SIGKILL
    assert part.log_tail() == "    up"


async def test_stop_of_what_never_ran_is_nothing(tmp_path: Path) -> None:
    """Stopping a child that was never started does nothing, and waiting for such a child raises RuntimeError."""
    part = child("pass", tmp_path / "log")
    await part.stop(1.0)
    with pytest.raises(RuntimeError, match="never started"):
        await part.wait()
