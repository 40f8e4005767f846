"""A sequence as the links to its workers see it: what happens if a worker accepts the sequence, refuses it, fails it or
is lost.

A sequence that leaves its worker continues on another worker after the tokens emitted so far. If it cannot continue,
its call ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import FinishReason, TokenOutput
from cluster.gateway.calls.sequences.engine_errors import format_error, refusal_of
from cluster.gateway.calls.sequences.hedge import Hedge
from cluster.gateway.calls.sequences.owner import SequenceOwner
from cluster.gateway.calls.sequences.routed_sequence import RoutedSequence
from cluster.gateway.links.worker_link import WorkerLink

Owner = TypeVar("Owner", bound=SequenceOwner)


@dataclass(eq=False, repr=False, slots=True)
class LinkedSequence(RoutedSequence[Owner]):
    """A sequence that handles all events of its workers except outputs. Each subclass adds the handling of outputs,
    which completes the protocol slots.Sink."""

    hedge: Hedge | None = field(init=False, default=None)
    """The slot on a second worker, while the sequence is hedged."""

    # ---- Sink

    def accepted(self) -> None:
        """Record that an engine has accepted the sequence. From now on, the sequence is charged."""
        self.admitted = True

    def refused(self, reason: str, message: str, field: str) -> None:
        """Handle a refusal by the worker. If the worker has no room, or cannot serve the adapter now, the sequence
        continues on its second worker if it has one, else it is queued again. Neither counts as a failure of the
        worker. Any other refusal means that the request is invalid, and the call ends."""
        link, self.link = self.link, None
        self.life.submission_refused(len(self.emitted))
        self.call.events.submission_refused(self)
        lacks_adapter = reason == Outcome.ADAPTER_INVALID.name and bool(self.request.adapter)
        if lacks_adapter and link is not None:
            link.adapters.lose(self.request.adapter)
        if reason != "NO_ROOM" and not lacks_adapter:
            self.end_attempt("refused")
            self._reject(reason, message, field)
        elif self.hedge is not None:
            self.hedge.keep("", has_failed=False, why="refused")
        else:
            self.end_attempt("refused")
            self.life.wait(len(self.emitted))
            self.call.events.requeue(self)

    def _reject(self, reason: str, message: str, field: str) -> None:
        """End the call, because the engine has refused the request as invalid."""
        self.call.fail(refusal_of(reason, message, field))

    def lost(self, why: str) -> None:
        """Handle the loss of the worker. The sequence continues on another worker after the tokens emitted so far."""
        link, self.link = self.link, None
        if link is not None and not link.draining:
            self.life.lost(link.name, link.identity.node, len(self.emitted), self.call.clock())
        if not self.finish_reason:
            message = f"the worker was lost after {len(self.emitted)} tokens ({why}); retry the call"
            self._retry_or_fail(CallError(Outcome.WORKER_LOST, message), "lost")

    def failed(self, error: BaseException) -> None:
        """End the call, because the handling of a message for the sequence raised `error`."""
        self.link = None
        self.call.fail_unexpectedly(error)

    # ---- steps of a subclass that handles an output

    def _record_first_output(self, output: TokenOutput) -> None:
        """Record the first output that a worker sends for the sequence."""
        cached = self.cached_at_worker(output)
        if not self.emitted or self.restored == len(self.emitted):
            self.cached_tokens = min(cached, len(self.request.prompt_token_ids))
        reason = self.life.answered()
        self.call.began(self, output)
        if reason:
            self.call.resumed(self, reason)

    def cached_at_worker(self, output: TokenOutput) -> int:
        """Return how many of the sequence's tokens the worker found in its cache, as its first output says: at most all
        of them."""
        return min(output.cached_tokens or 0, len(self.request.prompt_token_ids) + len(self.emitted))

    def _engine_ended(self, finish: FinishReason, link: WorkerLink | None, message: str = "") -> None:
        """Handle an output that ends with ERROR or ABORT. If it ended because of the requested output
        format, the call ends. Otherwise the engine is at fault, and another engine may continue the sequence."""
        if (error := format_error(self.request, finish, message)) is not None:
            self.call.fail(error)
            return
        if link is not None:
            self.life.exclude(link.identity.incarnation)
            self.call.events.worker_failed(self, link)
        self._retry_or_fail(self._engine_error(), "error")

    def _engine_error(self) -> CallError:
        """Return the error of the call if engines have failed the sequence in all attempts."""
        message = (
            f"the engine failed in each of {self.life.max_attempts} attempts; a retry is safe, but if it fails too, "
            "the request itself may be the cause"
        )
        return CallError(Outcome.INTERNAL, message)

    def _retry_or_fail(self, error: CallError, reason: str) -> None:
        """Continue on another worker. If too many workers have failed the sequence, end the call with `error` instead.
        `reason`: why the sequence leaves its worker, such as `lost` or `error`; call_trace.FINISHED has the list."""
        if self.hedge is not None:
            self.hedge.keep(self.life.last_worker, has_failed=True, why=reason)
            return
        self.end_attempt(reason)
        if self.life.fail_worker(reason, len(self.emitted)):
            self.call.events.requeue(self)
        else:
            self.call.fail(error)

    # ---- the scheduler

    def move(self, cached_on: str = "") -> None:
        """Leave the worker, which is draining. Another worker continues after the tokens emitted so far. `cached_on`:
        incarnation of a worker that has computed the KV blocks of the sequence, and that should continue; "" for
        none."""
        if self.hedge is not None:
            self.hedge.keep(self.life.last_worker, has_failed=False, why="moved")
        elif self.link is not None and not self.finish_reason:
            self.end_attempt("moved")
            self.leave_engine()
            self.life.leave("moved", len(self.emitted), cached_on)
            self.call.events.requeue(self)

    def cut(self) -> None:
        """Finish the sequence with the tokens emitted so far and the finish reason "length"."""
        if not self.finish_reason:
            self.finish("length")
            self.leave_engine()

    def leave_engine(self) -> None:
        """Abort the sequence in its engine, and in the second engine while the sequence is hedged."""
        if self.hedge is not None:
            self.hedge.leave()
        RoutedSequence.leave_engine(self)

    # ---- the second worker of a hedged sequence: sequences.hedge.HedgedSequence

    def bind_hedge(self, hedge: Hedge) -> None:
        """Record that the request was also sent to a second worker. Implements HedgedSequence."""
        self.life.hedged()
        self.hedge = hedge

    def switch_to_hedge(self, hedge: Hedge, why: str) -> None:
        """Leave the first worker, and continue on the second worker, to which the hedge has sent the request. `why`:
        the reason for leaving, such as `lost` or `error` (call_trace.FINISHED). Implements HedgedSequence."""
        RoutedSequence.leave_engine(self)
        self.hedge = None
        self.end_attempt(why)
        self.traced = hedge.traced
        self.set_route(hedge.route)
        self.link, self.slot, self.worker = hedge.link, hedge.slot, hedge.link.identity

    def drop_hedge(self) -> None:
        """Continue on the first worker alone, without the hedge. Implements HedgedSequence."""
        self.hedge = None
