"""Drain state of a worker: whether the worker takes new sequences.

Operators set the state, and so does the end of the worker's process. Every gateway is sent the state. A cordoned worker
takes no new sequences and keeps the running sequences. A draining worker lets running sequences end by themselves for
part of the drain time; then the gateways resume the remaining sequences on other workers, and no sequence is cut off.
Uncordon undoes both, unless the process is about to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.outbox import Outbox

STAY_PART = 0.5
"""Fraction of the drain time in which running sequences may end by themselves; then they resume on other workers."""


class DrainStates:
    """The drain state of one worker. `outboxes` returns the outboxes of all links of the worker."""

    def __init__(self, outboxes: Callable[[], Iterable[Outbox]]) -> None:
        self._outboxes = outboxes
        self._stays_until = 0.0
        self.state = DrainState.SERVING
        self.leaving = False
        """Whether a drain before the end of the process has begun; such a drain cannot be undone."""

    @property
    def serves(self) -> bool:
        """Whether the worker takes new sequences."""
        return self.state is DrainState.SERVING

    def cordon(self, now: float) -> None:
        """Take no new sequences and keep the running sequences. Changes nothing if the worker drains already."""
        if self.serves:
            self._set_state(DrainState.CORDONED, now)

    def uncordon(self, now: float) -> bool:
        """Take new sequences again; return False if nothing changed."""
        if self.serves or self.leaving:
            return False
        self._set_state(DrainState.SERVING, now)
        return True

    def drain(self, now: float, timeout_s: float, leaving: bool) -> None:
        """Take no new sequences; running sequences end or move to other workers. A second drain sets the end time anew.

        If the process is about to end, the earlier end time counts.
        """
        stays_until = now + timeout_s * STAY_PART
        self._stays_until = min(self._stays_until, stays_until) if self.leaving else stays_until
        self.leaving |= leaving
        self._set_state(DrainState.DRAINING, now)

    def mark_drained(self, now: float) -> None:
        """Mark the worker as drained, because no sequence runs any more.

        Changes nothing if the worker was uncordoned meanwhile.
        """
        if self.state is DrainState.DRAINING:
            self._set_state(DrainState.DRAINED, now)

    def attach(self, outbox: Outbox, now: float) -> None:
        """Send the state to a new link, unless the worker serves.

        A gateway that has not been sent a state assumes that the worker serves.
        """
        if not self.serves:
            outbox.drain_state(self._message(now))

    def _set_state(self, state: DrainState, now: float) -> None:
        self.state = state
        for outbox in self._outboxes():
            outbox.drain_state(self._message(now))

    def _message(self, now: float) -> pb.Standing:
        stay_ms = int(max(self._stays_until - now, 0.0) * 1000) if self.state is DrainState.DRAINING else 0
        return pb.Standing(state=pb.Standing.State.Value(f"STATE_{self.state.value}"), stay_ms=stay_ms)
