"""Processors as hosts have them: a host has half of the machine's at most, and where all wait for one, a host's pods
get that host's share, a pod what it asks for.

Without this the hosts are one machine whose kernel shares its processors by session: a pod that starts a session for
each of its processes, as Ray's does, takes them from the pods of other hosts. Groups of the kernel's cpu controller
(version 1 or 2), as a kubelet makes them of `requests`; every host has the same share of the machine. Shares alone do
not keep hosts apart: when Ray's GCS ended, the dashboard of one host, which hands its interpreter from thread to thread
a thousand times a second, kept everything else on the machine, the harness too, from both cores for 0.7 s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
ONE_CPU, LEAST = 1024, 2
"""Shares of a whole processor and the fewest there are, by Kubernetes and version 1."""
PERIOD_US = 10_000
"""A host that has used up what it has waits for the next period: not longer than a kernel lets others run anyway."""
OF_MACHINE = 0.5
"""The most that one host can take, and one whole processor at least: the others have the rest among them."""


@dataclass(eq=False, slots=True)
class Shares:
    """The groups below one of the harness's own."""

    root: Path
    weights: bool
    """Version 2, which counts otherwise."""
    made: list[Path] = field(default_factory=list)

    def group(self, host: str, pod: str, cpus: float) -> Path:
        """Where a pod's processes belong."""
        return self._make(self._host(host) / pod, max(round(cpus * ONE_CPU), LEAST))

    def _host(self, name: str) -> Path:
        home = self.root / name
        if not home.exists():
            self._bound(self._make(home, ONE_CPU))
        return home

    def _bound(self, host: Path) -> None:
        quota_us = max(round((os.cpu_count() or 1) * OF_MACHINE * PERIOD_US), PERIOD_US)
        if self.weights:
            (host / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
        else:
            (host / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (host / "cpu.cfs_quota_us").write_text(str(quota_us))

    def _make(self, path: Path, shares: int) -> Path:
        if not path.exists():
            path.mkdir()
            self.made.append(path)
            if self.weights:
                if path.parent != V2:
                    (path.parent / "cgroup.subtree_control").write_text("+cpu")
                (path / "cpu.weight").write_text(str(weight(shares)))
            else:
                (path / "cpu.shares").write_text(str(shares))
        return path


def weight(shares: int) -> int:
    """Version 2's for version 1's, 1 to 10,000, as Kubernetes converts them (KEP-2254)."""
    return 1 + (shares - 2) * 9999 // 262142


@contextlib.contextmanager
def shares(hosts: int) -> Iterator[Shares | None]:
    """Groups for so many hosts while it is entered; None where this machine lets nobody make any."""
    name = f"headrace-{os.getpid()}"
    weights = not (V1 / "cpu.shares").exists()
    parent = V2 if weights else V1
    found = Shares(parent / name, weights)
    try:
        try:
            if weights and "cpu" not in (V2 / "cgroup.subtree_control").read_text().split():
                raise PermissionError("the cpu controller is not given to groups here")
            found._make(found.root, hosts * ONE_CPU)
            found._host("probe")  # a machine that bounds nobody keeps hosts apart no better than none
        except OSError:
            yield None
            return
        yield found
    finally:
        for path in reversed(found.made):
            with contextlib.suppress(OSError):  # a process that is still being reaped
                path.rmdir()
