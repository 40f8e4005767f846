"""The drain state of a worker: whether it takes new sequences, as set by operators or by the end of its process.

Every gateway is sent the state. A cordoned worker takes no new sequences and keeps those that run. A draining worker
lets running sequences end by themselves for part of the drain time; then the gateways resume them on other workers,
and none is cut off. Uncordon undoes both, unless the process is about to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.outbox import Outbox

STAY_PART = 0.5
"""Part of the drain time in which running sequences may end by themselves; then they resume on other workers."""


class DrainStates:
    """The drain state of one worker. `outboxes` returns the outboxes of all its links."""

    def __init__(self, outboxes: Callable[[], Iterable[Outbox]]) -> None:
        self._outboxes = outboxes
        self._stays_until = 0.0
        self.state = DrainState.SERVING
        self.leaving = False
        """Set by a drain before the end of the process: nothing undoes it."""

    @property
    def serves(self) -> bool:
        """Whether the worker takes new sequences."""
        return self.state is DrainState.SERVING

    def cordon(self, now: float) -> None:
        """Take no new sequences and keep those that run. Changes nothing if the worker drains already."""
        if self.serves:
            self._set_state(DrainState.CORDONED, now)

    def uncordon(self, now: float) -> bool:
        """Take new sequences again; return False if nothing changed."""
        if self.serves or self.leaving:
            return False
        self._set_state(DrainState.SERVING, now)
        return True

    def drain(self, now: float, timeout_s: float, leaving: bool) -> None:
        """Take no new sequences; running ones end or move. A second drain sets the time anew.

        If the process is about to end, the earlier of both times counts.
        """
        stays_until = now + timeout_s * STAY_PART
        self._stays_until = min(self._stays_until, stays_until) if self.leaving else stays_until
        self.leaving |= leaving
        self._set_state(DrainState.DRAINING, now)

    def mark_drained(self, now: float) -> None:
        """Mark the worker as drained: nothing runs any more. Changes nothing if it was uncordoned meanwhile."""
        if self.state is DrainState.DRAINING:
            self._set_state(DrainState.DRAINED, now)

    def attach(self, outbox: Outbox, now: float) -> None:
        """Send the state to a new link, unless the worker serves: gateways assume that until they are sent a state."""
        if not self.serves:
            outbox.drain_state(self._message(now))

    def _set_state(self, state: DrainState, now: float) -> None:
        self.state = state
        for outbox in self._outboxes():
            outbox.drain_state(self._message(now))

    def _message(self, now: float) -> pb.Standing:
        stay_ms = int(max(self._stays_until - now, 0.0) * 1000) if self.state is DrainState.DRAINING else 0
        return pb.Standing(state=pb.Standing.State.Value(f"STATE_{self.state.value}"), stay_ms=stay_ms)
