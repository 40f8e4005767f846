"""CPU time and memory of the serving side, by class of process.

The command line of a process determines the process's class. If no class matches, the process has the class of its
parent. A root, which is a process that the harness has started, has the class that the harness has given it.

The kernel counts the CPU time of a whole process, all threads included, in steps of 10 ms. A measured round takes so
long that the steps do not matter.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

ENGINE_CORE, ENGINE_RANK = "engine core", "engine rank"
SIMULATED = "simulated engine"
_BY_COMMAND = (
    (re.compile(r"^VLLM::EngineCore"), ENGINE_CORE),
    (re.compile(r"^VLLM::Worker"), ENGINE_RANK),
    (re.compile(r"^ray::.*[Pp]roxy"), "ray proxy"),
    (re.compile(r"^ray::.*ServeReplica"), "ray replica"),
    (re.compile(r"^ray::.*ServeController"), "ray controller"),
    (re.compile(r"^ray::"), "ray worker"),
    (re.compile(r"raylet|gcs_server|ray/dashboard|ray/_private|log_monitor|runtime_env"), "ray system"),
)
ENGINE = frozenset((ENGINE_CORE, ENGINE_RANK))
NOBODY = frozenset((SIMULATED,))
"""Classes of processes that are not counted: the stand-in for an engine behind a peer."""


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """Sample of one process at one moment."""

    kind: str
    cpu_s: float
    rss_bytes: int


Snapshot = Mapping[tuple[int, float], ProcessSample]
"""Samples by (pid, creation time), so that a reused pid is another process."""


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU time and memory of the serving side between two snapshots, by class of process."""

    cpu_s: Mapping[str, float]
    rss_bytes: Mapping[str, int]

    def front_end_s(self) -> float:
        """Return the CPU seconds of all processes except engine cores, ranks and simulated engines."""
        return sum(s for kind, s in self.cpu_s.items() if kind not in ENGINE | NOBODY)

    def whole_s(self) -> float:
        """Return the CPU seconds of all processes except simulated engines."""
        return sum(s for kind, s in self.cpu_s.items() if kind not in NOBODY)


def snapshot(roots: Iterable[tuple[int, str]]) -> Snapshot:
    """Return samples of all living processes under `roots`. Each root is (pid, class)."""
    samples: dict[tuple[int, float], ProcessSample] = {}
    for pid, kind in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            _sample_tree(psutil.Process(pid), kind, samples)
    return samples


def _sample_tree(process: psutil.Process, kind: str, samples: dict[tuple[int, float], ProcessSample]) -> None:
    try:
        with process.oneshot():
            times, rss = process.cpu_times(), process.memory_info().rss
            kind = classify(" ".join(process.cmdline()), kind)
            cpu_s, created = times.user + times.system, process.create_time()
            samples[(process.pid, created)] = ProcessSample(kind, cpu_s, rss)
        children = process.children()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return
    for child in children:
        _sample_tree(child, kind, samples)


def classify(command: str, parents: str) -> str:
    """Return the class of a process by its command line. If the command line matches no class, return `parents`, the
    class of the parent process."""
    return next((kind for pattern, kind in _BY_COMMAND if pattern.search(command)), parents)


def usage_between(before: Snapshot, after: Snapshot) -> Usage:
    """Return the usage between two snapshots. A process that began between the snapshots counts from its beginning."""
    cpu: dict[str, float] = {}
    rss: dict[str, int] = {}
    for key, now in after.items():
        then = before.get(key)
        cpu[now.kind] = cpu.get(now.kind, 0.0) + now.cpu_s - (then.cpu_s if then else 0.0)
        rss[now.kind] = rss.get(now.kind, 0) + now.rss_bytes
    return Usage(cpu, rss)


def own_processor(number: int) -> Mapping[str, str]:
    """Return the environment of an engine that computes on one processor only. `number`: the engine's number; engines
    with different numbers get different processors, as long as there are enough. Engines that share processors make
    each other many times slower, since their threads wait for one another in loops."""
    processors = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": str(processors[number % len(processors)])}


def pin(pid: int, cpus: Iterable[int]) -> None:
    """Bind a process, its threads and all its descendants to `cpus`. Processes that have ended are skipped."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    _pin_threads(family, list(cpus))


def pin_driver(cpus: Iterable[int]) -> None:
    """Bind this process and all its threads to `cpus`. Its child processes, which are the servers, keep their own
    CPUs."""
    _pin_threads([psutil.Process()], list(cpus))


def _pin_threads(processes: Iterable[psutil.Process], cpus: list[int]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for thread in process.threads():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cpus)
