"""Output of a call, one of n. The tokens arrive from the link, become text, and wait for the API or go directly to the
API.

Tokens become text when they arrive, not when the client reads. So a stop string ends the engine's work at once, even if
the client is slow. A slow client gets several tokens in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind
from cluster.api.types import PARSER_KINDS, TOOL_PARSER, CompatibilityKey, FinishReason, TokenOutput
from cluster.gateway.calls.hedge import FAILED, Hedge
from cluster.gateway.calls.routed_sequence import RoutedSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.logprobs import LogprobSource, TokenLogprob
from cluster.gateway.text.parsed_text import ParsedText

_FINISH_WORDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.REPETITION: "stop"}

_NO_SUCH_PARSER = "no worker is left that parses the output as its first worker did; send a new call"

CALLER_FIELDS = {"prompt_token_ids": "prompt", "grammar": "response_format", "structured_outputs": "response_format"}
"""Names of request fields as callers know them, by the name of the engine field."""


def refusal_of(reason: str, message: str, field: str) -> CallError:
    """Translate an engine's refusal into the error for the caller. An engine's message begins with the engine's name of
    the field."""
    outcome = Outcome.__members__.get(reason, Outcome.INTERNAL)
    if not field:
        return CallError(outcome, message)
    name, message = CALLER_FIELDS.get(field, field), message.removeprefix(f"{field}: ")
    return CallError(outcome, f"{name}: {message}", violations=[Violation(name, message)])


@dataclass(slots=True)
class Piece:
    """New text, log probabilities and finish reason of one sequence since the sequence's last piece."""

    index: int
    text: str
    finish_reason: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    first: bool = False
    parts: Sequence[OutputPart] = ()
    """The parts since the last piece, in order, if the worker parses the output. `text` is then the joined content."""
    stop_string: str = ""
    """The stop string that has ended the sequence, set with `finish_reason`; "" if none has."""

    @property
    def chars(self) -> int:
        """Number of characters in the piece, over all of its parts."""
        return sum(len(part.text) for part in self.parts) if self.parts else len(self.text)


class CallEvents(Protocol):
    """Receiver of the events of sequences, for the gateway's scheduler, accounts and metrics. The methods run in a
    link's reader, so every method must be short and cannot await."""

    def requeue(self, sequence: OutputSequence[Any]) -> None:
        """Queue the sequence again. The state of the sequence decides between the waiting room and the resume queue."""

    def began(self, sequence: OutputSequence[Any], cached_tokens: int) -> None:
        """Handle a sequence's first output. `cached_tokens`: number of prompt tokens that were in the worker's
        cache."""

    def answered(self, link: WorkerLink) -> None:
        """Handle the first output that a worker sends for a sequence."""

    def worker_failed(self, link: WorkerLink) -> None:
        """Handle a worker whose engine could not continue a sequence."""

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """Handle the resume of a sequence on another worker. `gap_s`: seconds since the sequence's last token."""

    def submission_refused(self, sequence: OutputSequence[Any]) -> None:
        """Handle a worker's refusal of a sequence."""

    def finished(self, sequence: OutputSequence[Any]) -> None:
        """Handle the end of one of many sequences of a call that goes on."""

    def hedge_ended(self, sequence: OutputSequence[Any], won: bool, computed_by: str) -> None:
        """Handle that one of the two workers of a hedged sequence is out: the first if the hedge has `won`, else the
        second. `computed_by`: incarnation of the worker that is out; "" if it has refused the sequence."""


class SequenceOwner(Protocol):
    """Interface of a call that a sequence needs. The methods run in a link's reader, so every method must be short and
    cannot await."""

    id: str
    arrived: float

    @property
    def clock(self) -> Callable[[], float]:
        """Clock that returns monotonic seconds."""

    @property
    def events(self) -> CallEvents:
        """Receiver of the events of the sequence."""

    def fail(self, error: CallError) -> None:
        """End the call with this error."""

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call with INTERNAL, because work for the call raised `error`."""

    def wake(self) -> None:
        """Notify the call's API of an update."""

    def progressed(self, sequence: OutputSequence[Any], tokens: int, now: float) -> None:
        """Handle the tokens of a step, if the output is more than one plain token."""

    def began(self, sequence: OutputSequence[Any], output: TokenOutput) -> None:
        """Handle the first output that a worker sends for the sequence."""

    def resumed(self, sequence: OutputSequence[Any], reason: str) -> None:
        """Handle the first token after a resume on another worker."""

    def reasoned(self, tokens: int) -> None:
        """Count the reasoning tokens of the sequence, which has ended."""


Owner = TypeVar("Owner", bound=SequenceOwner)


@dataclass(eq=False, repr=False, slots=True)
class OutputSequence(RoutedSequence[Owner]):
    """Output of a call, one of n. Implements the Sink of worker_link.py."""

    detokenizer: TextSource
    logprob_texts: LogprobSource | None = None
    parsed_text: ParsedText | None = None
    """The `detokenizer`, if the worker may parse the output."""
    reasoning_tokens: int = field(init=False, default=0)
    """Number of reasoning tokens in the whole output, known when the output ends."""
    direct: Callable[[str], None] | None = field(init=False, default=None)
    """Function that gets the text of each further token that brings nothing but text; None to keep the text."""
    direct_content: Callable[[str], None] | None = field(init=False, default=None)
    """The same for a parsed output: function that gets the content of each further token that brings only content."""
    hedge: Hedge | None = field(init=False, default=None)
    """The slot on a second worker, while the sequence is hedged."""
    _piece_popped: bool = field(init=False, default=False)
    _end_popped: bool = field(init=False, default=False)
    _stop_string: str = field(init=False, default="")
    _parsers: tuple[str, ...] = field(init=False, default=())
    """The worker's capabilities that name the parsers of the output; empty if the worker does not parse."""
    _logprobs: list[TokenLogprob] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        RoutedSequence.__post_init__(self)  # `super()` does not work in a dataclass with slots
        self.emitted = self.detokenizer.token_ids

    # ---- from a resume token

    def restore(
        self, token_ids: Sequence[int], chars: int, finish_reason: str, worker: str, key: CompatibilityKey | None
    ) -> None:
        """Continue the sequence after these tokens, which another gateway has received. `chars`: number of characters
        of their text that were delivered. Raises ValueError if the tokens have less text."""
        self.detokenizer.restore(token_ids, chars)
        if self.logprob_texts is not None:
            self.logprob_texts.restore(token_ids)
        self.restored, self.last_token_at = len(token_ids), self.call.arrived
        self._piece_popped, self._end_popped = bool(token_ids), bool(finish_reason)
        self.life.restore(worker, key, len(token_ids))
        if finish_reason:
            self.finish(finish_reason)
        elif len(token_ids) >= self.request.sampling.max_tokens:
            self.finish("length")  # the last token was delivered, the end was not

    def take_over_tokens(self, older: OutputSequence[Owner]) -> None:
        """Take over the further tokens that this gateway has received for an earlier reader of the same sequence, so
        that these tokens are not computed again. A sequence with log probabilities or with a parsed output takes no
        tokens over, because log probabilities and parts are not kept."""
        more = older.emitted[len(self.emitted) :]
        keeps_more = self.logprob_texts is not None or self.parsed_text is not None
        if self.finish_reason or older.finish_reason or keeps_more or not more:
            return
        stop = self.detokenizer.push(more)
        self.restored = len(self.emitted)
        self.life.restore(older.last_worker, older.compatibility, len(self.emitted))
        if stop is not None:
            self._stopped(stop)
        elif len(self.emitted) >= self.request.sampling.max_tokens:
            self.finish("length")

    # ---- Sink

    def accepted(self) -> None:
        """Record that an engine has accepted the sequence, which is charged from now on."""
        self.admitted = True

    def refused(self, reason: str, message: str, field: str) -> None:
        """Handle a refusal by the engine. If the engine had no room, or no longer has the adapter, the sequence is
        queued again. Otherwise the request is invalid and the call fails."""
        link, self.link = self.link, None
        self.life.submission_refused(len(self.emitted))
        self.call.events.submission_refused(self)
        if reason == "NO_ROOM" and self.hedge is not None:
            self._keep_hedge(self.hedge, "", has_failed=False, why="refused")
            return
        self.end_attempt("refused")
        if reason == "NO_ROOM":
            self.life.wait(len(self.emitted))
            self.call.events.requeue(self)
        elif field == "tools" and self.parsed_text is not None and self.parsed_text.is_parsed:
            self.life.excluded |= {self.life.last_worker}
            self._retry_or_fail(Outcome.RESUME_UNSUPPORTED, "error", _NO_SUCH_PARSER)
        elif reason == Outcome.ADAPTER_INVALID.name and self.request.adapter:  # it has dropped the adapter just now
            if link is not None:
                link.adapters.lose(self.request.adapter)
            self._retry_or_fail(Outcome.ADAPTER_INVALID, "error", message)
        else:
            self.call.fail(refusal_of(reason, message, field))

    def output(self, output: TokenOutput) -> None:
        """Handle the output of one engine step."""
        call = self.call
        if self.hedge is not None and output.finish not in FAILED:
            self._leave_hedge(self.hedge)
        if output.times is not None and self.traced is not None:
            self.traced.add_times(output.times)
        if output.prompt_tokens is not None and self.hedge is None:
            if self.parsed_text is not None and not self._parses_as_before(output):
                self._leave_wrong_parser(output)
                return
            self._record_first_output(output)
        self.stop_direct()
        if output.finish is not None:
            link = self.link
            self.link = None
            if output.finish in FAILED:
                self._engine_ended(output.finish, link)
                return
            self.finish(_FINISH_WORDS[output.finish])
        before = len(self.emitted)
        if self.parsed_text is None:
            stop = self.detokenizer.push(output.token_ids, output.finish is FinishReason.STOP)
        else:
            stop = self._push_parsed(self.parsed_text, output)
        if stop is not None:
            self._stopped(stop)
        added = max(len(self.emitted) - before, 0)  # a guard's refusal also removes tokens of earlier steps
        if output.logprobs and self.logprob_texts is not None:
            self._logprobs += self.logprob_texts.push(output.logprobs[:added])
        if added:
            now = call.clock()
            call.progressed(self, added, now)
            self.last_token_at = now
        else:
            call.wake()

    def _push_parsed(self, parsed_text: ParsedText, output: TokenOutput) -> str | None:
        """Add the tokens of one engine step to the text. Returns what has ended the text, None while it goes on."""
        ends = output.finish is FinishReason.STOP
        stop = parsed_text.push_parsed(output.token_ids, output.parsed, ends, output.prompt_tokens is not None)
        if output.parsed is not None and output.parsed.reasoning_tokens:
            self.reasoning_tokens = output.parsed.reasoning_tokens
            self.call.reasoned(self.reasoning_tokens)
        if self.finish_reason == "stop" and parsed_text.has_tool_call:
            self.finish_reason = "tool_calls"
        return stop

    def _record_first_output(self, output: TokenOutput) -> None:
        """Record the first output that a worker sends for the sequence."""
        cached = output.cached_tokens or 0
        if not self.emitted:
            self.cached_tokens = cached
        elif self.restored == len(self.emitted):
            self.cached_tokens = min(cached, len(self.request.prompt_token_ids))
        reason = self.life.answered()
        self.call.began(self, output)
        if reason:
            self.call.resumed(self, reason)

    def token(self, token_id: int, now: float) -> None:
        """Handle a step's only token, as a fast path of `output`. Never called for the first token."""
        self.last_token_at = now
        direct = self.direct
        if direct is not None:
            text = self.detokenizer.text_of(token_id)
            if text:
                direct(text)
            return
        if (stop := self.detokenizer.push((token_id,))) is not None:
            self._stopped(stop)
        elif self.parsed_text is not None and self.parsed_text.is_parsed:
            return  # the parser has made nothing of this token yet
        self.call.wake()

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Handle a step's only token and its parts, as a fast path of `output`. Never called for the first token."""
        parsed_text = self.parsed_text
        if parsed_text is None:  # no parts were asked for
            self.token(token_id, now)
            return
        self.last_token_at = now
        direct = self.direct_content
        if direct is not None and len(parts) == 1 and parts[0].kind is PartKind.CONTENT:
            text = parts[0].text
            parsed_text.pass_content(token_id, text)
            direct(text)
            return
        self.direct_content = None
        if (stop := parsed_text.push_parsed((token_id,), ParsedOutput(parts), False, False)) is not None:
            self._stopped(stop)
        self.call.wake()

    def go_direct(self, direct: Callable[[str], None]) -> None:
        """Pass the text of each further token to `direct`, if a piece has been delivered and further tokens bring only
        text."""
        if self.finish_reason or self.logprob_texts is not None or not self._piece_popped:
            return
        if not self.detokenizer.searches_text:
            self.direct = direct
        elif self.parsed_text is not None and self.parsed_text.passes_content:
            self.direct_content = direct

    def stop_direct(self) -> None:
        """Stop passing text to `direct`, and keep all further text for `pop_piece`."""
        self.direct = self.direct_content = None

    def give_back(self, text: str) -> None:
        """Put back the text that was just passed to `direct`. This text and all further text is kept for
        `pop_piece`."""
        self.stop_direct()
        self.detokenizer.push_back(text)

    def cut(self) -> None:
        """Finish the sequence with the tokens emitted so far and the finish reason "length"."""
        if not self.finish_reason:
            self.stop_direct()
            self.finish("length")
            self.leave_engine()

    def _stopped(self, stop: str) -> None:
        """Finish the sequence because of a stop string or a guard's refusal, and abort the engine's work."""
        if self.detokenizer.refused:
            self.finish("content_filter")
        else:
            self._stop_string = stop
            has_call = self.parsed_text is not None and self.parsed_text.has_tool_call
            self.finish("tool_calls" if has_call else "stop")
        self.leave_engine()

    @property
    def tool_parser(self) -> str:
        """The parser of tool calls that the worker parses the output with, by vLLM's name; "" if there is none."""
        return next((word.removeprefix(TOOL_PARSER) for word in self._parsers if word.startswith(TOOL_PARSER)), "")

    def _parses_as_before(self, output: TokenOutput) -> bool:
        """Return whether the worker of a first output parses the output as the workers before it did, if any did. Other
        parsers would make other parts of the same tokens."""
        words = self.link.info.capabilities if self.link is not None and output.parsed is not None else ()
        parsers = tuple(word for word in words if word.startswith(PARSER_KINDS))
        if self.parsed_text is None or not self.parsed_text.is_parsed:
            self._parsers = parsers
        return parsers == self._parsers

    def _leave_wrong_parser(self, output: TokenOutput) -> None:
        """Leave a worker that parses the output in another way than the worker before. Another worker continues."""
        link = self.link
        if output.finish is None:
            self.leave_engine()
        self.link = None
        if link is not None:
            self.life.excluded |= {link.identity.incarnation}
        self._retry_or_fail(Outcome.RESUME_UNSUPPORTED, "error", _NO_SUCH_PARSER)

    def _engine_ended(self, finish: FinishReason, link: WorkerLink | None) -> None:
        """Handle an output that finishes with ERROR or ABORT. If the request has a grammar, ERROR means that the
        grammar allowed no token. Otherwise the engine is at fault, and another engine may continue."""
        parsing = self.request.parsing
        field = "tools" if parsing is not None and parsing.needs_tools else "response_format"
        if finish is FinishReason.ERROR and (self.request.sampling.grammar is not None or field == "tools"):
            self.call.fail(
                invalid(
                    field,
                    "no further token fits this format together with the call's other fields "
                    "(nothing fits the format, or it needs one of stop_token_ids); change one of them",
                )
            )
            return
        if link is not None:
            self.life.excluded |= {link.identity.incarnation}
            self.call.events.worker_failed(link)
        message = "the engine could not continue this call; it is safe to retry"
        self._retry_or_fail(Outcome.INTERNAL, "error", message)

    def failed(self, error: BaseException) -> None:
        """End the call, because the handling of a message for the call raised `error`."""
        self.link = None
        self.call.fail_unexpectedly(error)

    def lost(self, why: str) -> None:
        """Handle the loss of the worker. The sequence continues on another worker after the tokens emitted so far."""
        link, self.link = self.link, None
        if link is not None and not link.draining:
            self.life.lost(link.name, link.identity.node, len(self.emitted), self.call.clock())
        if not self.finish_reason:
            message = f"the worker was lost after {len(self.emitted)} tokens ({why}); retry the call"
            self._retry_or_fail(Outcome.WORKER_LOST, "lost", message)

    def _retry_or_fail(self, outcome: Outcome, reason: str, message: str) -> None:
        if self.hedge is not None:
            self._keep_hedge(self.hedge, self.last_worker, has_failed=True, why=reason)
            return
        self.end_attempt(reason)
        if self.life.fail_worker(reason, len(self.emitted)):
            self.call.events.requeue(self)
        else:
            self.call.fail(CallError(outcome, message))

    def move(self) -> None:
        """Leave the draining worker. Another worker continues after the tokens emitted so far."""
        if self.hedge is not None:
            RoutedSequence.leave_engine(self)
            self._keep_hedge(self.hedge, self.last_worker, has_failed=False, why="moved")
        elif self.link is not None and not self.finish_reason:
            self.end_attempt("moved")
            self.leave_engine()
            self.life.leave("moved", len(self.emitted))
            self.call.events.requeue(self)

    # ---- the second worker of a hedged sequence: calls.hedge.HedgedSequence

    def bind_hedge(self, hedge: Hedge) -> None:
        """Record the second worker and the slot to which the request was sent."""
        self.life.hedged()
        self.hedge = hedge

    def leave_engine(self) -> None:
        """Abort the sequence in the engines where it runs."""
        if self.hedge is not None:
            self._leave_hedge(self.hedge)
        RoutedSequence.leave_engine(self)

    def hedge_won(self, output: TokenOutput) -> None:
        """Continue on the second worker, which has answered first, and abort the sequence in the first engine."""
        if self.hedge is not None:
            RoutedSequence.leave_engine(self)
            self._keep_hedge(self.hedge, self.last_worker, has_failed=False, why="hedged")
            self.output(output)

    def hedge_refused(self) -> None:
        """Stay on the first worker, because the second has refused the sequence."""
        if self.hedge is not None:
            self.call.events.submission_refused(self)
            self._end_hedge(self.hedge, "", has_failed=False, why="refused")

    def hedge_lost(self) -> None:
        """Stay on the first worker, because the second was lost."""
        if self.hedge is not None:
            link = self.hedge.link
            if not link.draining:
                self.life.lost(link.name, link.identity.node, len(self.emitted), self.call.clock())
            self._end_hedge(self.hedge, link.identity.incarnation, has_failed=True, why="lost")

    def hedge_broken(self) -> None:
        """Stay on the first worker, because the second engine could not begin the sequence."""
        if self.hedge is not None:
            link = self.hedge.link
            if self.request.sampling.grammar is None:  # else the grammar may have allowed no token
                self.life.excluded |= {link.identity.incarnation}
                self.call.events.worker_failed(link)
            self._end_hedge(self.hedge, link.identity.incarnation, has_failed=True, why="error")

    def hedge_failed(self, hedge: Hedge, error: BaseException) -> None:
        """End the call, because the handling of a message for the hedge raised `error`."""
        if self.hedge is hedge:
            self.call.fail_unexpectedly(error)
        else:  # the sequence has taken over the slot
            self.failed(error)

    def _keep_hedge(self, hedge: Hedge, computed_by: str, has_failed: bool, why: str) -> None:
        """Continue on the second worker alone. `computed_by`: see CallEvents.hedge_ended. `why`: see end_attempt."""
        self.hedge = None
        self.end_attempt(why)
        self.traced = hedge.traced
        self.set_route(hedge.route)
        self.link, self.slot, self.worker = hedge.link, hedge.slot, hedge.link.identity
        hedge.link.slots.replace_sink(hedge.slot, self)
        self.life.hedge_ended(hedge.link.identity.incarnation, has_failed)
        self.call.events.hedge_ended(self, True, computed_by)

    def _leave_hedge(self, hedge: Hedge) -> None:
        """Abort the sequence in the second engine, and stay on the first worker."""
        hedge.link.abort(hedge.slot)
        self._end_hedge(hedge, hedge.link.identity.incarnation, has_failed=False, why="hedged")

    def _end_hedge(self, hedge: Hedge, computed_by: str, has_failed: bool, why: str) -> None:
        """Continue on the first worker alone. `why`: see end_attempt."""
        self.hedge = None
        if hedge.traced is not None:
            hedge.traced.end(why)
        self.life.hedge_ended(self.last_worker, has_failed)
        self.call.events.hedge_ended(self, False, computed_by)

    # ---- the API

    def pop_piece(self) -> Piece | None:
        """Return the text, finish reason and log probabilities since the last piece; None if there is nothing new."""
        if self._end_popped:
            return None
        finished = bool(self.finish_reason)
        text = self.detokenizer.pop_text(finished)
        if finished:
            if self.detokenizer.refused:  # a guard refused text that was held back to the end
                self.finish_reason = "content_filter"
            if self.logprob_texts is not None:
                self._logprobs += self.logprob_texts.push(())
        parts = () if self.parsed_text is None else self.parsed_text.pop_parts()
        if not (text or finished or self._logprobs or parts):
            return None
        self._end_popped = finished
        piece = Piece(self.index, text, self.finish_reason, self._logprobs, not self._piece_popped, parts)
        if finished:
            piece.stop_string = self._stop_string
        self._piece_popped = True
        self._logprobs = []
        return piece

    def pop_text(self) -> str | None:
        """Return the text since the last piece if there is nothing else to deliver. Returns None otherwise; then
        `pop_piece` must be called."""
        if self.finish_reason or self._logprobs or not self._piece_popped:
            return None
        if self.parsed_text is not None and self.parsed_text.has_parts:
            return None
        return self.detokenizer.pop_text(False)

    @property
    def pending_chars(self) -> int:
        """Upper bound on the number of characters that wait for `pop_piece`."""
        return self.detokenizer.pending_chars

    @property
    def delivered(self) -> int:
        """Number of tokens whose text was delivered at least in part."""
        return len(self.emitted) if self._end_popped else len(self.emitted) - self.detokenizer.pending_tokens()

    @property
    def shown(self) -> int:
        """Number of tokens for which the caller has got text or a log probability."""
        return self.delivered if self.logprob_texts is None else len(self.emitted)

    @property
    def end_delivered(self) -> bool:
        """Whether the last piece of the sequence has been returned."""
        return self._end_popped
