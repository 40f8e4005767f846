"""Processors as pods have them: where all wait for one, each gets by what it asks for, whichever host it is on.

Without this the hosts are one machine whose kernel shares its processors by session: a pod that starts a session for
each of its processes, as Ray's does, takes them from the pods of other hosts. Groups of the kernel's cpu controller
(version 1 or 2), as a kubelet makes them of `requests`, but all beside each other: pods below hosts below the harness,
with a bound for each host, kept even the kernel's own threads from the processors for up to 0.8 s (Linux 6.18).
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


@dataclass(eq=False, slots=True)
class Shares:
    """The groups of the harness, by their names' beginning."""

    parent: Path
    name: str
    weights: bool
    """Version 2, which counts otherwise."""
    made: list[Path] = field(default_factory=list)

    def group(self, host: str, pod: str, cpus: float) -> Path:
        """Where a pod's processes belong."""
        path = self.parent / f"{self.name}-{host}-{pod}"
        if not path.exists():
            path.mkdir()
            self.made.append(path)
            share = max(round(cpus * ONE_CPU), LEAST)
            file, told = ("cpu.weight", weight(share)) if self.weights else ("cpu.shares", share)
            (path / file).write_text(str(told))
        return path


def weight(shares: int) -> int:
    """Version 2's for version 1's, 1 to 10,000, as Kubernetes converts them (KEP-2254)."""
    return 1 + (shares - 2) * 9999 // 262142


@contextlib.contextmanager
def shares() -> Iterator[Shares | None]:
    """Groups while it is entered; None where this machine lets nobody make any."""
    weights = not (V1 / "cpu.shares").exists()
    found = Shares(V2 if weights else V1, f"headrace-{os.getpid()}", weights)
    try:
        try:
            if weights and "cpu" not in (V2 / "cgroup.subtree_control").read_text().split():
                raise PermissionError("the cpu controller is not given to groups here")
            found.group("probe", "probe", 1.0)
        except OSError:
            yield None
            return
        yield found
    finally:
        for path in found.made:
            with contextlib.suppress(OSError):  # a process that is still being reaped
                path.rmdir()
