"""Interfaces to which a sequence reports its events: its call, and the receiver of the events of all sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from cluster.api.outcomes import CallError
from cluster.api.types import TokenOutput
from cluster.gateway.links.worker_link import WorkerLink

AnySequence = TypeVar("AnySequence", contravariant=True)


class CallEvents(Protocol[AnySequence]):
    """Receiver of the events of sequences, which passes them to the gateway's scheduler, accounts and metrics. The task
    that reads a worker's messages calls the methods, so every method must be short and cannot await."""

    def requeue(self, sequence: AnySequence) -> None:
        """Queue the sequence again: in the waiting room or in the resume queue, as the state of the sequence
        demands."""

    def began(self, sequence: AnySequence, cached_tokens: int) -> None:
        """Handle the first output of a sequence that has no tokens yet. `cached_tokens`: number of prompt tokens that
        were in the worker's cache."""

    def answered(self, sequence: AnySequence, link: WorkerLink) -> None:
        """Handle the first output that the worker of `link` sends for the sequence. Also called after each resume."""

    def worker_failed(self, sequence: AnySequence, link: WorkerLink) -> None:
        """Handle a worker whose engine could not continue the sequence."""

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """Handle the resume of a sequence on another worker. `gap_s`: seconds since the sequence's last token."""

    def submission_refused(self, sequence: AnySequence) -> None:
        """Handle a worker's refusal of a sequence."""

    def finished(self, sequence: AnySequence) -> None:
        """Handle the end of one of several sequences of a call. The other sequences may run for a long time."""

    def hedge_ended(self, sequence: AnySequence, won: bool, computed_by: str) -> None:
        """Handle the end of a sequence's hedge. Only one worker keeps the sequence: if `won`, the second worker, else
        the first. `computed_by`: incarnation of the worker that drops out; "" if that worker has refused the
        sequence."""


class Notifier(Protocol):
    """Wakes a call's API when one of the call's sequences has new output."""

    def wake(self) -> None:
        """Notify the call's API of an update."""


class SequenceOwner(Protocol):
    """The part of a call's interface that its sequences use. The task that reads a worker's messages calls the methods,
    so every method must be short and cannot await."""

    id: str
    arrived: float

    @property
    def clock(self) -> Callable[[], float]:
        """Clock that returns monotonic seconds."""

    @property
    def events(self) -> CallEvents[Any]:
        """Receiver of the events of the sequence."""

    def fail(self, error: CallError) -> None:
        """End the call with this error."""

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call with the error INTERNAL, because work for the call raised `error`."""

    @property
    def output(self) -> Notifier:
        """The output of the call, which the call's API reads."""

    def progressed(self, sequence: Any, tokens: int, now: float) -> None:
        """Handle an engine step that has added `tokens` tokens to a sequence. For a step that adds a single token, the
        fast paths `OutputSequence.token` and `parsed_token` may be used instead; they do not call this method."""

    def began(self, sequence: Any, output: TokenOutput) -> None:
        """Handle the first output that a worker sends for the sequence."""

    def resumed(self, sequence: Any, reason: str) -> None:
        """Handle the first token after a resume on another worker."""

    def reasoned(self, tokens: int) -> None:
        """Count the reasoning tokens of the sequence, which has ended."""
