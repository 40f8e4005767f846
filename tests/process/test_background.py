"""Lower priorities of child processes hold for each of their threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cluster.process.background import lower_threads, run_threads_when_idle

CHILD = """
import threading, time
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(flush=True)
time.sleep(60)
"""


@pytest.fixture
def threads() -> Iterator[tuple[int, list[int]]]:
    """A child process and the ids of its four threads."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid, [int(tid) for tid in os.listdir(f"/proc/{child.pid}/task")]
        child.kill()


def test_all_threads_run_when_idle(threads: tuple[int, list[int]]) -> None:
    pid, tids = threads
    run_threads_when_idle(pid)
    assert [os.sched_getscheduler(tid) for tid in tids] == [os.SCHED_IDLE] * 4


def test_all_threads_are_lowered(threads: tuple[int, list[int]]) -> None:
    pid, tids = threads
    lower_threads(pid, 3)
    assert [os.getpriority(os.PRIO_PROCESS, tid) for tid in tids] == [os.getpriority(os.PRIO_PROCESS, 0) + 3] * 4
