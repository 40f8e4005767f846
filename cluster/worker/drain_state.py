"""Drain state of a worker: whether the worker takes new sequences.

An operator's command or the end of the worker's process sets the state, which is sent to every gateway. A cordoned
worker takes no new sequences and keeps the running sequences. A draining worker takes no new sequences either. Its
running sequences may end by themselves for part of the drain time; then the gateways resume the remaining sequences on
other workers. Uncordon undoes both states, except in a process that is about to end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.outbox import Outbox

USAGE_ACK_S = 5.0
"""Seconds that a drained worker waits for the acknowledgement of its last usage records."""
STAY_PART = 0.5
"""Fraction of the drain time in which running sequences may end by themselves. The rest then resume elsewhere."""


class DrainStates:
    """The drain state of one worker. Each change is sent to all links of the worker."""

    def __init__(self) -> None:
        self._outboxes: list[Outbox] = []
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
        """Begin a drain: take no new sequences, and let running sequences end by themselves.

        `timeout_s`: duration of the whole drain. Running sequences may stay for the fraction STAY_PART of this
        time. `leaving`: whether the process ends after the drain. A second drain sets a new time. After a drain
        with `leaving`, a further drain can only shorten the time.
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
        """Add a link, and send the state to its gateway unless the worker is serving.

        A gateway that has received no state assumes that the worker is serving.
        """
        self._outboxes.append(outbox)
        if not self.serves:
            outbox.drain_state(self._message(now))

    def detach(self, outbox: Outbox) -> None:
        """Remove a link that has ended."""
        self._outboxes.remove(outbox)

    def _set_state(self, state: DrainState, now: float) -> None:
        self.state = state
        for outbox in self._outboxes:
            outbox.drain_state(self._message(now))

    def _message(self, now: float) -> pb.Standing:
        stay_ms = int(max(self._stays_until - now, 0.0) * 1000) if self.state is DrainState.DRAINING else 0
        return pb.Standing(state=pb.Standing.State.Value(f"STATE_{self.state.value}"), stay_ms=stay_ms)


class Drains:
    """The drain in progress of one worker.

    A new drain or uncordon command cancels the drain that an earlier command began.
    """

    def __init__(
        self, state: DrainStates, idle: asyncio.Event, flush_usage: Callable[[float], Awaitable[None]]
    ) -> None:
        """Create the object without a drain in progress.

        `idle`: set while no request runs. `flush_usage(s)`: waits up to `s` seconds until gateways have acknowledged
        all usage records.
        """
        self._state = state
        self._idle = idle
        self._flush_usage = flush_usage
        self._commanded: asyncio.Task[bool] | None = None

    async def drain(self, timeout_s: float, leaving: bool) -> bool:
        """Take no new work and wait for the running requests; return False if some still run after `timeout_s`.

        `leaving`: whether the process ends afterwards, so that uncordon cannot undo the drain.
        """
        self._state.drain(time.monotonic(), timeout_s, leaving)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        await self._flush_usage(min(timeout_s, USAGE_ACK_S))
        self._state.mark_drained(time.monotonic())
        return True

    def apply(self, command: pb.Command) -> bool:
        """Apply an operator's command. Any gateway may forward the command.

        Returns True if the worker takes new sequences again because of the command.
        """
        verb = command.WhichOneof("verb")
        if verb == "cordon":
            self._state.cordon(time.monotonic())
        elif verb == "uncordon":
            self.cancel()
            return self._state.uncordon(time.monotonic())
        elif verb == "drain" and not self._state.leaving:
            self.cancel()
            self._commanded = asyncio.create_task(self.drain(command.drain.timeout_ms / 1000, leaving=False))
        return False

    def cancel(self) -> None:
        """Cancel the drain that a command began, if any. The drain state does not change."""
        if self._commanded is not None:
            self._commanded.cancel()
