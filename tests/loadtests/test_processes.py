"""Child processes end with all their descendants, and their CPU time is counted in the right class."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from loadtests.children import ROOT, Child, Children, DidNotStart
from loadtests.processes import ENGINE_CORE, ProcessSample, Usage, classify, pin, pin_driver, snapshot, usage_between
from tests.support.cluster import until

pytestmark = pytest.mark.slow

# The program has a child process. Both processes ignore SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", inner])
time.sleep(600)
"""
BUSY = """
import time
end = time.process_time() + 0.3
while time.process_time() < end:
    pass
print("up", flush=True)
time.sleep(600)
"""


def _family(child: Child) -> list[psutil.Process]:
    return psutil.Process(child.pid).children(recursive=True)


def _runs(process: psutil.Process) -> bool:
    """Return whether the process runs; a zombie does not count."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _says_up(child: Child) -> None:
    await until(lambda: "up" in child.log.read_text(), f"{child.name} says that it is up")


async def test_a_stubborn_family_is_gone_at_the_end(tmp_path: Path) -> None:
    """A child and a grandchild that ignore SIGTERM do not outlive the context."""
    async with Children(tmp_path, term_s=0.2) as children:
        child = children.start("stubborn", "x", [sys.executable, "-c", STUBBORN])
        await _says_up(child)
        family = _family(child)
    assert len(family) >= 3
    assert not [process for process in family if _runs(process)]


async def test_servers_stay_on_their_cores_when_the_driver_is_bound(tmp_path: Path) -> None:
    """When the driver of a load test is bound to cores, the servers that it has started keep their own cores.

    Otherwise the driver and all servers would share the driver's cores.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one core: nothing can be bound apart")
    try:
        async with Children(tmp_path) as children:
            child = children.start("server", "x", [sys.executable, "-c", BUSY])
            await _says_up(child)
            pin(child.pid, cpus[:1])
            pin_driver(cpus[1:])
            assert {tuple(process.cpu_affinity()) for process in _family(child)} == {tuple(cpus[:1])}
            assert sorted(os.sched_getaffinity(0)) == cpus[1:]
    finally:
        pin_driver(cpus)


async def test_nothing_stays_when_the_harness_is_killed(tmp_path: Path) -> None:
    """When the harness is killed, the standard input of the guard process closes, and the guard ends the whole process
    group."""
    harness = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom loadtests.children import Children\n"
        "async def main():\n"
        f"    async with Children(Path({str(tmp_path)!r})) as children:\n"
        f"        child = children.start('stubborn', 'x', [sys.executable, '-c', {STUBBORN!r}])\n"
        "        print(child.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", harness], stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: ASYNC220
    assert process.stdout is not None
    group = int(process.stdout.readline())
    log = tmp_path / "stubborn.log"
    await until(lambda: log.exists() and "up" in log.read_text(), "its child is up")
    process.kill()
    process.wait()

    def gone() -> bool:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        return all(p.status() == psutil.STATUS_ZOMBIE for p in psutil.process_iter() if os.getpgid(p.pid) == group)

    await until(gone, "the whole group is gone")


async def test_a_program_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    """If a program ends at once, the failure is reported at once, without waiting for the timeout. The report has the
    end of the program's log."""
    async with Children(tmp_path) as children:
        child = children.start("broken", "x", [sys.executable, "-c", "raise SystemExit('no such model')"])

        async def never() -> bool:
            return False

        with pytest.raises(DidNotStart, match=r"broken ended(?s:.)*no such model"):
            await child.until(never, "it serves", 30.0)


async def test_a_cancelled_stop_still_ends_the_child(tmp_path: Path) -> None:
    """A stop that is interrupted still ends every process of the child."""
    async with Children(tmp_path, term_s=0.3) as children:
        child = children.start("stubborn", "x", [sys.executable, "-c", STUBBORN])
        await _says_up(child)
        family = _family(child)
        stopping = asyncio.create_task(child.stop())
        await asyncio.sleep(0)
        stopping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopping
    assert not [process for process in family if _runs(process)]


async def test_cpu_time_of_a_child_is_counted_in_its_class(tmp_path: Path) -> None:
    """The 0.3 s of CPU time of a child are counted in the child's class and in no other class."""
    async with Children(tmp_path) as children:
        child = children.start("busy", "gateway", [sys.executable, "-c", BUSY])
        before = snapshot([(child.pid, child.kind)])
        await _says_up(child)
        usage = usage_between(before, snapshot([(child.pid, child.kind)]))
    assert set(usage.cpu_s) == {"gateway"}
    assert 0.25 <= usage.cpu_s["gateway"] <= 0.8
    assert usage.rss_bytes["gateway"] > 1 << 20


def test_processes_are_told_apart_by_their_command_lines() -> None:
    """vLLM's and Ray's process titles give a process its class. Every other process has the class of its parent."""
    assert classify("VLLM::EngineCore", "vllm server") == ENGINE_CORE
    assert classify("VLLM::Worker_TP0", "vllm server") == "engine rank"
    assert classify("ray::ProxyActor", "ray system") == "ray proxy"
    assert classify("ray::ServeReplica:bench:plain", "ray system") == "ray replica"
    assert classify("python -c from multiprocessing.resource_tracker import main", "gateway") == "gateway"


def test_front_end_is_all_but_engines_and_what_counts_for_nobody() -> None:
    """The front end's CPU time excludes engine cores, ranks and simulated engines. The whole CPU time excludes only
    simulated engines."""
    usage = Usage(
        {"gateway": 1.0, "worker replica": 2.0, "engine core": 4.0, "engine rank": 8.0, "simulated engine": 16.0}, {}
    )
    assert usage.front_end_s() == 3.0
    assert usage.whole_s() == 15.0


def test_a_process_that_began_in_between_counts_from_its_begin() -> None:
    """A process that began between two snapshots counts from its beginning. A process with a reused pid counts as
    another process."""
    before = {(5, 100.0): ProcessSample("gateway", 2.0, 10)}
    after = {(5, 200.0): ProcessSample("gateway", 0.5, 20), (6, 150.0): ProcessSample("gateway", 0.25, 30)}
    assert usage_between(before, after).cpu_s == {"gateway": 0.75}
