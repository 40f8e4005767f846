"""Detection of hanging parses: whether a parser process works on one session for too long.

The process's CPU time is measured, so that time in which the process waits for a CPU does not count. A hanging process
that sleeps uses no CPU time, so there is also a bound on the wall time. This bound is so long that a busy machine does
not reach it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster.worker.parsing.parser_process import ParserHost
from cluster.worker.parsing.progress import NONE

CPU_LIMIT_S = 2.0
"""CPU seconds after which the work on one message counts as hung. Parses of long outputs take milliseconds."""
WALL_LIMIT_S = 20.0


@dataclass(slots=True)
class HangWatch:
    """Detects whether one process hangs.

    `progress`: returns the same values as ParserProgress.read. `cpu_s`: returns the CPU seconds that the process has
    used.
    """

    progress: Callable[[], tuple[int, int]]
    cpu_s: Callable[[], float]
    cpu_limit_s: float = CPU_LIMIT_S
    wall_limit_s: float = WALL_LIMIT_S
    _seen: tuple[int, int] = (NONE, 0)
    _since: tuple[float, float] = field(default=(0.0, 0.0))
    """State when `_seen` was first read: the CPU seconds used by the process, and the time."""

    @classmethod
    def of(cls, host: ParserHost) -> HangWatch:
        """Return the HangWatch of a started process."""
        return cls(host.progress.read, lambda: cpu_seconds(host.pid))

    def hung(self, now: float) -> int:
        """Return the number of the parsing session in which the process hangs; NONE if it does not hang. `now`:
        monotonic seconds."""
        seen = self.progress()
        if seen != self._seen or seen[0] == NONE:
            self._seen, self._since = seen, (self.cpu_s(), now)
            return NONE
        cpu_s, since = self._since
        if self.cpu_s() - cpu_s > self.cpu_limit_s or now - since > self.wall_limit_s:
            return seen[0]
        return NONE


def cpu_seconds(pid: int | None) -> float:
    """Return the CPU seconds that a process has used; 0 if they are unknown."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
