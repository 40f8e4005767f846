"""A cgroup of the cpu controller for the processes of all pods. All processes compete equally for processors, except
processes with a nice value (pods.py).

Without the cgroup the kernel shares this machine's processors by session. A pod that starts a session for each process,
as Ray's pod does, would then take processors from the pods of other hosts, whereas real hosts have separate processors.
One group for each host, or groups by the pods' CPU requests, are no better: a group that sleeps has hardly any weight
when it wakes, and on Linux 6.18 pods in groups of hosts waited for up to 0.8 s. In one group a process that uses little
CPU runs within 20 ms, even while many other processes use all the CPU time that they get.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextlib.contextmanager
def cgroup() -> Iterator[Path | None]:
    """Create a control group that exists while the context is open. Yields None if this machine does not permit it. The
    group has the CPU weight that the kernel gives to one session (setsid). With a larger weight, all other processes
    had to wait for a processor for over a second."""
    parent = V1 if (V1 / "cpu.shares").exists() else V2
    path = parent / f"headrace-{os.getpid()}"
    try:
        if parent == V2 and "cpu" not in (V2 / "cgroup.subtree_control").read_text().split():
            raise PermissionError("the cpu controller is not enabled for cgroups here")
        path.mkdir(exist_ok=True)  # an earlier process with this pid may have been killed
    except OSError:
        yield None
        return
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # a process that is still being reaped
            path.rmdir()
