"""An engine that gets no core is told from one that hangs, by what the kernel says of its threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.processes.starvation import LEAST_S, SHARE, Starvation, Task, Tasks, lost_s, read_tasks

KEY = (1, 1)


class Machine:
    """A thread's counters in virtual time."""

    def __init__(self) -> None:
        self.now = self.ran = self.waited = 0.0
        self.runnable = False

    def tasks(self) -> Tasks:
        """As /proc tells them."""
        return {KEY: Task(self.ran, self.waited, self.runnable)}


def until_alarm(pass_time: Callable[[Machine, float], None], ends_s: float = 20.0) -> float:
    """When a step that began at 0 is no longer explained, looked at ten times a second as gateways do."""
    machine = Machine()
    starvation = Starvation(machine.tasks)
    unexplained = 0.0
    while machine.now < ends_s:
        pass_time(machine, 0.1)
        machine.now += 0.1
        explained = starvation.explains(machine.now, 0.02, machine.now)
        unexplained = 0.0 if explained else unexplained + 0.1
        if unexplained > LEAST_S:
            return machine.now
    return float("inf")


@given(st.floats(0.8, 1.0), st.booleans())
def test_what_gets_no_core_hangs_not(part: float, told_late: bool) -> None:
    """On a busy host "its engine has not stepped for 0.5 s" came twenty times an hour. The kernel adds what a thread
    has waited as it goes on, or, for one that never runs, not at all; then it is runnable for all the time."""

    def starves(machine: Machine, seconds: float) -> None:
        machine.runnable = True
        if not told_late:
            machine.ran += (1 - part) * seconds
            machine.waited += part * seconds

    assert until_alarm(starves, 2.0) == float("inf")


@pytest.mark.parametrize("runs", [0.0, 1.0], ids=["sleeps or is stopped", "spins"])
def test_what_hangs_is_found_as_early_as_ever(runs: float) -> None:
    """Neither a deadlock, nor SIGSTOP, nor an endless loop with a core of its own is excused for a moment."""

    def hangs(machine: Machine, seconds: float) -> None:
        machine.ran += runs * seconds
        machine.runnable = bool(runs)

    assert until_alarm(hangs) <= LEAST_S + 0.2


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_hang_on_a_busy_machine_is_found_late(ran: float, waited: float) -> None:
    """An endless loop that waits for its core is found by its own time: no busy machine hides it for ever."""
    total = max(ran + waited, 1.0)

    def spins(machine: Machine, seconds: float) -> None:
        machine.ran += ran / total * seconds
        machine.waited += waited / total * seconds

    own = 1 - waited / total
    if own > 0.1:
        assert until_alarm(spins, 60.0) <= 2 * LEAST_S / own + LEAST_S + 0.5


@given(
    st.dictionaries(st.integers(0, 3), st.tuples(st.floats(0, 9), st.floats(0, 9), st.booleans()), max_size=4),
    st.dictionaries(st.integers(0, 3), st.tuples(st.floats(0, 9), st.floats(0, 9), st.booleans()), max_size=4),
    st.floats(0.01, 1.0),
)
def test_no_more_is_lost_than_has_passed(before: dict[int, tuple], after: dict[int, tuple], window_s: float) -> None:  # type: ignore[type-arg]
    """Threads that come and go, counters that a kernel sets back: what is excused is between nothing and the window."""
    samples = [{(1, key): Task(*task) for key, task in some.items()} for some in (before, after)]
    assert 0.0 <= lost_s(samples[0], samples[1], window_s) <= window_s


SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def spinning(core: int, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """So many processes that share one core."""
    some = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for one in some:
            assert one.stdout is not None
            one.stdout.readline()
        yield some
    finally:
        for one in some:
            one.kill()
            one.communicate()


def lost_share(pid: int, wanted: Callable[[float], bool]) -> float:
    """What part of the time a process has waited, as soon as it is as wanted, within ten seconds."""
    deadline, share = time.monotonic() + 10.0, -1.0
    while time.monotonic() < deadline and not wanted(share):
        before, began = read_tasks([pid]), time.monotonic()
        os.sched_yield()
        signal.sigtimedwait([], 0.2)
        window_s = time.monotonic() - began
        share = lost_s(before, read_tasks([pid]), window_s) / window_s
    return share


@pytest.mark.slow
def test_the_kernel_tells_who_waits() -> None:
    """Four processes on one core wait for it; one that is stopped beside them does not."""
    core = min(os.sched_getaffinity(0))
    with spinning(core, 4) as some:
        pid = some[0].pid
        if not any(task.ran_s for task in read_tasks([pid]).values()):
            pytest.skip("this kernel keeps no schedstat: boot with CONFIG_SCHED_INFO")
        assert lost_share(pid, lambda share: share > SHARE) > SHARE
        os.kill(pid, signal.SIGSTOP)
        assert 0 <= lost_share(pid, lambda share: 0 <= share < 0.05) < 0.05
    assert read_tasks([pid]) == {}
