"""The second Submit of a sequence whose first worker is late. policy/scheduling/hedging.py decides when there is one.

The sink of the first worker's slot is the sequence itself, and the sink of the second worker's slot is a `Hedge`. If
the second worker answers first or the first worker fails, the sequence replaces the hedge as the sink, so that later
tokens cost no more than those of other sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.api.output_parts import OutputPart
from cluster.api.types import FinishReason, TokenOutput
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.tracing.call_trace import Attempt
from cluster.policy.routing.route_history import Route

FAILED = (FinishReason.ERROR, FinishReason.ABORT)
"""Reasons for which an engine ends a sequence that another engine may continue."""


class HedgedSequence(Protocol):
    """Interface of a sequence that a hedge needs."""

    def accepted(self) -> None:
        """Record that an engine has accepted the sequence."""

    def hedge_won(self, output: TokenOutput) -> None:
        """Handle the first output of the second worker, which keeps the sequence from now on."""

    def hedge_refused(self) -> None:
        """Handle the second worker's refusal of the sequence."""

    def hedge_lost(self) -> None:
        """Handle the loss of the second worker."""

    def hedge_broken(self) -> None:
        """Handle an output of the second worker that ends with ERROR or ABORT."""

    def hedge_failed(self, hedge: Hedge, error: BaseException) -> None:
        """End the call, because the handling of a message for the hedge raised `error`."""


@dataclass(eq=False, slots=True)
class Hedge:
    """The slot of a sequence on its second worker. Implements the Sink of slots.py until the first output."""

    sequence: HedgedSequence
    link: WorkerLink
    route: Route
    """The decision for the second worker."""
    slot: int = 0
    traced: Attempt | None = None
    """Record of the attempt on the second worker, if the call is sampled."""
    last_token_at: float = field(init=False, default=0.0)

    def accepted(self) -> None:
        """See Sink."""
        self.sequence.accepted()

    def refused(self, reason: str, message: str, field: str) -> None:
        """See Sink. The first worker decides whether the request is valid."""
        self.sequence.hedge_refused()

    def token(self, token_id: int, now: float) -> None:
        """Never called, since the first output ends the hedge."""
        raise AssertionError("a token came before the first output")

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Never called, since the first output ends the hedge."""
        raise AssertionError("a token came before the first output")

    def output(self, output: TokenOutput) -> None:
        """See Sink."""
        if output.finish in FAILED:
            self.sequence.hedge_broken()
        else:
            self.sequence.hedge_won(output)

    def lost(self, why: str) -> None:
        """See Sink."""
        self.sequence.hedge_lost()

    def failed(self, error: BaseException) -> None:
        """See Sink."""
        self.sequence.hedge_failed(self, error)
