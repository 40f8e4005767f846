"""The kernel's thread statistics distinguish an engine that waits for a CPU core from a hung engine."""

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
    """The counters of one thread in virtual time."""

    def __init__(self) -> None:
        self.now = self.ran = self.waited = 0.0
        self.runnable = False

    def tasks(self) -> Tasks:
        """Return the counters as `Tasks`, as if they were read from /proc."""
        return {KEY: Task(self.ran, self.waited, self.runnable)}


def until_alarm(pass_time: Callable[[Machine, float], None], ends_s: float = 20.0) -> float:
    """Return the time at which a gateway would report a hang of the engine, if a step began at 0 and does not end.
    Returns infinity if the gateway would report no hang before `ends_s`.

    The step is checked ten times a second, as by a gateway. `pass_time`: advances the counters of the simulated machine
    by a number of seconds.
    """
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
    """An engine that waits for a CPU core raises no alarm. Formerly, a busy host had twenty false alarms an hour.

    The kernel adds a thread's waiting time only when the thread runs again. If a thread never runs (`told_late`),
    its waiting time does not grow, and the only sign is that the thread stays runnable.
    """

    def starves(machine: Machine, seconds: float) -> None:
        machine.runnable = True
        if not told_late:
            machine.ran += (1 - part) * seconds
            machine.waited += part * seconds

    assert until_alarm(starves, 2.0) == float("inf")


@pytest.mark.parametrize("runs", [0.0, 1.0], ids=["sleeps or is stopped", "spins"])
def test_what_hangs_is_found_as_early_as_ever(runs: float) -> None:
    """A process that hangs is reported without delay, whether it is in a deadlock, stopped by SIGSTOP, or in an endless
    loop on a core that it has for itself."""

    def hangs(machine: Machine, seconds: float) -> None:
        machine.ran += runs * seconds
        machine.runnable = bool(runs)

    assert until_alarm(hangs) <= LEAST_S + 0.2


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_hang_on_a_busy_machine_is_found_late(ran: float, waited: float) -> None:
    """An endless loop is detected by the CPU time that it uses. If the loop's thread also waits for its core, the
    detection takes longer."""
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
    """The time lost in waiting for a core is between 0 and the window, even if threads change and counters go
    backwards."""
    samples = [{(1, key): Task(*task) for key, task in some.items()} for some in (before, after)]
    assert 0.0 <= lost_s(samples[0], samples[1], window_s) <= window_s


SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def spinning(core: int, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Run `count` busy processes on one core."""
    processes = [
        subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def lost_share(pid: int, wanted: Callable[[float], bool]) -> float:
    """Return the fraction of time for which a process has waited for a core.

    The fraction is measured again until `wanted` accepts it, for at most a minute.
    """
    deadline, share = time.monotonic() + 60.0, -1.0
    while time.monotonic() < deadline and not wanted(share):
        before, began = read_tasks([pid]), time.monotonic()
        os.sched_yield()
        signal.sigtimedwait([], 0.2)
        window_s = time.monotonic() - began
        share = lost_s(before, read_tasks([pid]), window_s) / window_s
    return share


@pytest.mark.slow
def test_the_kernel_tells_who_waits() -> None:
    """If four processes share one core, the kernel reports how much time one of them has waited for the core. For a
    stopped process, it reports almost no such time."""
    core = min(os.sched_getaffinity(0))
    with spinning(core, 4) as processes:
        pid = processes[0].pid
        if not any(task.ran_s for task in read_tasks([pid]).values()):
            pytest.skip("this kernel keeps no schedstat: boot with CONFIG_SCHED_INFO")
        assert lost_share(pid, lambda share: share > SHARE) > SHARE
        os.kill(pid, signal.SIGSTOP)
        assert 0 <= lost_share(pid, lambda share: 0 <= share < 0.05) < 0.05
    assert read_tasks([pid]) == {}
