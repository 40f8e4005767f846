"""Hedging: a sequence is sent to a second worker, because its first worker is late. policy/scheduling/hedging.py
decides when this happens.

A worker's messages for a sequence go to the sink of the sequence's slot on that worker. On the first worker, the sink
is the sequence itself. On the second worker, the sink is a `Hedge`. If the second worker answers first or the first
worker fails, the sequence replaces the hedge as the sink of the second slot, so that later tokens cost no more than
tokens of other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.api.output_parts import OutputPart
from cluster.api.types import EngineRequest, TokenOutput
from cluster.gateway.calls.sequences.engine_errors import FAILED
from cluster.gateway.calls.sequences.life import Life
from cluster.gateway.calls.sequences.owner import SequenceOwner
from cluster.gateway.links.slots import Sink
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.tracing.call_trace import Attempt
from cluster.policy.routing.route_history import Route


class HedgedSequence(Sink, Protocol):
    """The part of a sequence's interface that a hedge uses."""

    @property
    def call(self) -> SequenceOwner:
        """The call of the sequence."""

    @property
    def life(self) -> Life:
        """The state of the sequence."""

    @property
    def request(self) -> EngineRequest:
        """The request for the engines."""

    @property
    def emitted(self) -> Sequence[int]:
        """Tokens emitted so far."""

    def bind_hedge(self, hedge: Hedge) -> None:
        """Record that the request was also sent to a second worker."""

    def switch_to_hedge(self, hedge: Hedge, why: str) -> None:
        """Leave the first worker, and continue on the second worker. `hedge`: holds the sequence's slot on the second
        worker. `why`: the reason, such as `lost` or `error`; call_trace.FINISHED has the list."""

    def drop_hedge(self) -> None:
        """Continue on the first worker alone, without the hedge."""


@dataclass(eq=False, slots=True)
class Hedge:
    """The slot of a hedged sequence on the second of its two workers, as long as both workers have the sequence.
    Receives the second worker's messages until the first output (implements slots.Sink)."""

    sequence: HedgedSequence
    link: WorkerLink
    route: Route
    """The routing decision for the second worker."""
    traced: Attempt | None = None
    """Record of the attempt on the second worker, if the call is sampled."""
    slot: int = field(init=False, default=0)
    last_token_at: float = field(init=False, default=0.0)
    _is_over: bool = field(init=False, default=False)
    """Whether only one of the two workers still has the sequence."""

    def bind(self, slot: int) -> None:
        """Begin the hedge, after the request was sent to the second worker. `slot`: the request's number on the second
        worker's link."""
        self.slot = slot
        self.sequence.bind_hedge(self)

    # ---- Sink

    def accepted(self) -> None:
        """Handle the acceptance of the sequence by the second worker's engine. Implements Sink."""
        self.sequence.accepted()

    def refused(self, reason: str, message: str, field: str) -> None:
        """Continue on the first worker alone, because the second worker's engine has refused the sequence. The first
        worker decides whether the request is valid. Implements Sink."""
        if not self._is_over:
            self.sequence.call.events.submission_refused(self.sequence)
            self._stay("", has_failed=False, why="refused")

    def token(self, token_id: int, now: float) -> None:
        """Never called, since the first output ends the hedge."""
        raise AssertionError("a token came before the first output")

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Never called, since the first output ends the hedge."""
        raise AssertionError("a token came before the first output")

    def output(self, output: TokenOutput) -> None:
        """Handle the first output of the second worker. If it reports a failure of the second worker's engine, the
        first worker keeps the sequence, else the second worker keeps it. Implements Sink."""
        if self._is_over:
            return
        sequence = self.sequence
        if output.finish not in FAILED:
            self.keep(sequence.life.last_worker, has_failed=False, why="hedged")
            sequence.output(output)
            return
        if sequence.request.sampling.grammar is None:  # else the grammar may have allowed no token
            sequence.life.exclude(self._incarnation)
            sequence.call.events.worker_failed(sequence, self.link)
        self._stay(self._incarnation, has_failed=True, why="error")

    def lost(self, why: str) -> None:
        """Continue on the first worker alone, because the second worker is lost. Implements Sink."""
        if self._is_over:
            return
        sequence, link = self.sequence, self.link
        if not link.draining:
            sequence.life.lost(link.name, link.identity.node, len(sequence.emitted), sequence.call.clock())
        self._stay(self._incarnation, has_failed=True, why="lost")

    def failed(self, error: BaseException) -> None:
        """End the call, because the handling of a message from the second worker raised `error`. Implements Sink."""
        if self._is_over:  # the sequence has taken over the slot
            self.sequence.failed(error)
        else:
            self.sequence.call.fail_unexpectedly(error)

    # ---- the end of the hedge

    def keep(self, computed_by: str, *, has_failed: bool, why: str) -> None:
        """Continue the sequence on the second worker alone. `computed_by`: incarnation of the first worker; "" if it
        has refused the sequence. `has_failed`: whether the sequence has failed on the first worker. `why`: why the
        sequence leaves the first worker, such as `lost` or `error` (call_trace.FINISHED)."""
        sequence, self._is_over = self.sequence, True
        sequence.switch_to_hedge(self, why)
        self.link.slots.replace_sink(self.slot, sequence)
        sequence.life.hedge_ended(self._incarnation, has_failed)
        sequence.call.events.hedge_ended(sequence, True, computed_by)

    def leave(self) -> None:
        """End a hedge: abort the sequence on the second worker, and continue it on the first worker."""
        self.link.abort(self.slot)
        self._stay(self._incarnation, has_failed=False, why="hedged")

    def _stay(self, computed_by: str, *, has_failed: bool, why: str) -> None:
        """Continue the sequence on the first worker alone. `computed_by`: incarnation of the second worker, whose
        engine may have computed the prompt; "" if the engine has refused the sequence. `has_failed`: whether the second
        worker has failed the sequence. `why`: the reason, such as `lost` or `error` (call_trace.FINISHED)."""
        sequence, self._is_over = self.sequence, True
        sequence.drop_hedge()
        if self.traced is not None:
            self.traced.end(why)
        sequence.life.hedge_ended(sequence.life.last_worker, has_failed)
        sequence.call.events.hedge_ended(sequence, False, computed_by)

    @property
    def _incarnation(self) -> str:
        return self.link.identity.incarnation
