"""Whether a worker takes new work: what operators and the end of its process have said, told to every gateway.

Cordoned it takes nothing new and keeps what runs. Drained it lets what runs end by itself for a part of the time and
go on elsewhere after that; nothing is cut. Both are taken back by uncordon, unless the process is about to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.outbox import Outbox

STAY_PART = 0.5
"""The part of a drain's time in which running calls may end by themselves; then they go on elsewhere."""


class DrainStates:
    """One worker's standing. `outboxes` gives those of all its links."""

    def __init__(self, outboxes: Callable[[], Iterable[Outbox]]) -> None:
        self._outboxes = outboxes
        self._stays_until = 0.0
        self.state = DrainState.SERVING
        self.leaving = False
        """Set by a drain that comes before the process's end: nothing takes it back."""

    @property
    def serves(self) -> bool:
        """Whether new work is taken."""
        return self.state is DrainState.SERVING

    def cordon(self, now: float) -> None:
        """Nothing new; what runs stays. Of a worker that drains already nothing changes."""
        if self.serves:
            self._become(DrainState.CORDONED, now)

    def uncordon(self, now: float) -> bool:
        """Take work again; False where nothing changed."""
        if self.serves or self.leaving:
            return False
        self._become(DrainState.SERVING, now)
        return True

    def drain(self, now: float, timeout_s: float, leaving: bool) -> None:
        """Nothing new; what runs ends or moves. A second drain sets the time anew, but a process that is about to end
        keeps the earlier time."""
        stays_until = now + timeout_s * STAY_PART
        self._stays_until = min(self._stays_until, stays_until) if self.leaving else stays_until
        self.leaving |= leaving
        self._become(DrainState.DRAINING, now)

    def drained(self, now: float) -> None:
        """Nothing runs any more. Without meaning for one that has been uncordoned meanwhile."""
        if self.state is DrainState.DRAINING:
            self._become(DrainState.DRAINED, now)

    def attach(self, outbox: Outbox, now: float) -> None:
        """Tell a new link; one that has been told nothing takes the worker to serve."""
        if not self.serves:
            outbox.standing(self._told(now))

    def _become(self, state: DrainState, now: float) -> None:
        self.state = state
        for outbox in self._outboxes():
            outbox.standing(self._told(now))

    def _told(self, now: float) -> pb.Standing:
        stay_ms = int(max(self._stays_until - now, 0.0) * 1000) if self.state is DrainState.DRAINING else 0
        return pb.Standing(state=pb.Standing.State.Value(f"STATE_{self.state.value}"), stay_ms=stay_ms)
