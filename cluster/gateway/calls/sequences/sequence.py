"""An output sequence, one of the n outputs of a call. The tokens arrive on the link from the worker and become text.
The text waits for the API or is passed directly to the API.

Tokens become text when they arrive, not when the client reads. So a stop string ends the engine's work at once, even if
the client is slow. A slow client gets the text of several tokens in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.api.outcomes import CallError, Outcome
from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind
from cluster.api.types import FinishReason, TokenOutput
from cluster.gateway.calls.sequences.engine_errors import FAILED
from cluster.gateway.calls.sequences.life import Life
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.calls.sequences.owner import Notifier, SequenceOwner
from cluster.gateway.calls.sequences.pieces import PieceBuffer
from cluster.gateway.calls.sequences.routed_sequence import RoutedSequence
from cluster.gateway.resume_tokens.token_chain import ChoiceState
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.logprobs import LogprobSource
from cluster.gateway.text.parsed_text import ParsedText

_FINISH_WORDS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.REPETITION: "stop"}

_NO_SUCH_PARSER = "no worker is left that parses the output as its first worker did; send a new call"

Owner = TypeVar("Owner", bound=SequenceOwner)


@dataclass(eq=False, repr=False, slots=True)
class OutputSequence(LinkedSequence[Owner]):
    """An output sequence, one of the n outputs of a call. Receives the worker's messages for this output (implements
    slots.Sink)."""

    detokenizer: TextSource
    logprob_texts: LogprobSource | None = None
    parsed_text: ParsedText | None = None
    """The `detokenizer`, if the worker may parse the output."""
    reasoning_tokens: int = field(init=False, default=0)
    """Number of reasoning tokens in the whole output, known when the output ends."""
    direct: Callable[[str], None] | None = field(init=False, default=None)
    """Function that gets the text of each further token that brings nothing but text; None: the text is kept for the
    next piece."""
    direct_content: Callable[[str], None] | None = field(init=False, default=None)
    """Like `direct`, for a parsed output: function that gets the content of each further token that brings only
    content."""
    call_output: Notifier = field(init=False)
    """The output of the call, which is notified of updates."""
    pieces: PieceBuffer = field(init=False)
    """The new output, which the API has not popped yet."""

    def __post_init__(self) -> None:
        RoutedSequence.__post_init__(self)  # `super()` does not work in a dataclass with slots
        self.emitted = self.detokenizer.token_ids
        self.call_output = self.call.output
        self.pieces = PieceBuffer(self.index, self.detokenizer, self.logprob_texts, self.parsed_text)

    # ---- from a resume token

    def restore(self, state: ChoiceState) -> None:
        """Continue the sequence after the tokens of `state`, which another gateway has received. Raises ValueError if
        the text of these tokens is shorter than the delivered text, or if the output has guards."""
        self.pieces.restore(state.token_ids, state.chars, bool(state.finish_reason))
        self.restored, self.last_token_at = len(state.token_ids), self.call.arrived
        self.life.restore(state.worker, state.compatibility, len(state.token_ids))
        if state.finish_reason:
            self.finish(state.finish_reason)
        elif len(state.token_ids) >= self.request.sampling.max_tokens:
            self.finish("length")  # the last token was delivered, the end was not

    def take_over_tokens(self, token_ids: Sequence[int], life: Life) -> None:
        """Append output tokens that this gateway has received for an earlier stream of the call. They follow the output
        tokens that the caller's resume tokens contain. `life`: the sequence's state in the earlier stream."""
        stop = self.detokenizer.push(token_ids)
        self.restored = len(self.emitted)
        self.life.restore(life.last_worker, life.compatibility, len(self.emitted))
        if stop is not None:
            self._stopped(stop)
        elif len(self.emitted) >= self.request.sampling.max_tokens:
            self.finish("length")

    # ---- Sink

    def output(self, output: TokenOutput) -> None:
        """Handle the output of one engine step."""
        call = self.call
        if self.hedge is not None and output.finish not in FAILED:
            self.hedge.leave()
        if output.times is not None and self.traced is not None:
            self.traced.add_times(output.times)
        if output.prompt_tokens is not None and self.hedge is None:
            if self.parsed_text is not None and not self._accept_parsers(self.parsed_text, output):
                return
            self._record_first_output(output)
        self.stop_direct()
        if output.finish is not None:
            link = self.link
            self.link = None
            if output.finish in FAILED:
                self._engine_ended(output.finish, link, output.message)
                return
            self.finish(_FINISH_WORDS[output.finish])
        emitted = self.emitted
        before = len(emitted)
        if self.parsed_text is None:
            stop = self.detokenizer.push(output.token_ids, output.finish is FinishReason.STOP)
        else:
            stop = self._push_parsed(self.parsed_text, output)
        if stop is not None:
            self._stopped(stop)
        added = max(len(emitted) - before, 0)  # a guard's refusal also removes tokens of earlier steps
        if output.logprobs and (logprob_texts := self.logprob_texts) is not None:
            self.pieces.logprobs.extend(logprob_texts.push(output.logprobs[:added]))
        if added:
            now = call.clock()
            call.progressed(self, added, now)
            self.last_token_at = now
        else:
            self.call_output.wake()

    def _accept_parsers(self, parsed_text: ParsedText, output: TokenOutput) -> bool:
        """Return whether the worker that sent a first output has the same parsers as the earlier workers of the
        sequence. If not, the sequence leaves this worker, and another worker continues."""
        link = self.link
        capabilities = link.info.capabilities if link is not None and output.parsed is not None else ()
        if parsed_text.parsers.accept(capabilities, parsed_text.is_parsed):
            return True
        if output.finish is None:
            self.leave_engine()
        self.link = None
        if link is not None:
            self.life.exclude(link.identity.incarnation)
        self._retry_or_fail(CallError(Outcome.RESUME_UNSUPPORTED, _NO_SUCH_PARSER), "error")
        return False

    def _reject(self, reason: str, message: str, field: str) -> None:
        """End the call, because the engine has refused the request as invalid.

        In one case the sequence continues on another worker instead: this worker refuses the tools, but an
        earlier worker has already parsed a part of the output. Then the two workers have different parsers, and a
        third worker may have the right ones.
        """
        if field == "tools" and self.parsed_text is not None and self.parsed_text.is_parsed:
            self.life.exclude(self.life.last_worker)
            self._retry_or_fail(CallError(Outcome.RESUME_UNSUPPORTED, _NO_SUCH_PARSER), "error")
        else:
            LinkedSequence._reject(self, reason, message, field)

    def _push_parsed(self, parsed_text: ParsedText, output: TokenOutput) -> str | None:
        """Add the tokens of one engine step to the text. Returns None while the text continues. If a stop string has
        ended the text, returns that stop string; if a guard has ended it, returns GUARD."""
        ends = output.finish is FinishReason.STOP
        stop = parsed_text.push_parsed(output.token_ids, output.parsed, ends, output.prompt_tokens is not None)
        if output.parsed is not None and output.parsed.reasoning_tokens:
            reasoning_tokens = min(output.parsed.reasoning_tokens, len(self.emitted))
            self.call.reasoned(reasoning_tokens - self.reasoning_tokens)
            self.reasoning_tokens = reasoning_tokens
        if self.finish_reason == "stop" and parsed_text.has_tool_call:
            self.finish("tool_calls")
        return stop

    def token(self, token_id: int, now: float) -> None:
        """Handle the only token of an engine step, as a fast path of `output`. Never called for the first token."""
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
        self.call_output.wake()

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Handle the only token of an engine step and the parts that the worker's parser made of it, as a fast path of
        `output`. Never called for the first token."""
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
        self.call_output.wake()

    def go_direct(self, direct: Callable[[str], None]) -> None:
        """Pass the text of each further token to `direct`, instead of keeping it for the next piece.

        Does nothing in five cases: (1) the API has not popped a piece yet; (2) the output has ended; (3) log
        probabilities are wanted; (4) stop strings or guards search the text; (5) the API has not popped all parts that
        the worker's parser has made.
        """
        if self.logprob_texts is not None or not self.pieces.more_text:
            return
        if not self.detokenizer.searches_text:
            self.direct = direct
        elif self.parsed_text is not None and self.parsed_text.passes_content:
            self.direct_content = direct

    def stop_direct(self) -> None:
        """Stop passing text to the functions `direct` and `direct_content`. All further text is kept until the API
        requests the next piece."""
        self.direct = self.direct_content = None

    def give_back(self, text: str) -> None:
        """Take back a text that `direct` could not send. This text and all further text are kept for the next piece."""
        self.stop_direct()
        self.detokenizer.push_back(text)

    # ---- the end

    def finish(self, reason: str, stop_string: str = "") -> None:
        """Finish the sequence normally. Its tokens are kept. `reason`: the finish reason. `stop_string`: the stop
        string that has ended the sequence, if any."""
        RoutedSequence.finish(self, reason)
        self.stop_direct()
        self.pieces.finish(reason, stop_string)

    def _stopped(self, stop: str) -> None:
        """Finish the sequence because of a stop string or a guard's refusal, and abort the engine's work."""
        if self.detokenizer.refused:
            self.finish("content_filter")
        else:
            has_call = self.parsed_text is not None and self.parsed_text.has_tool_call
            self.finish("tool_calls" if has_call else "stop", stop)
        self.leave_engine()

    def unlink_call(self) -> None:
        """Drop the reference to the ended call, so that the call and the sequence are freed without the garbage
        collector."""
        RoutedSequence.unlink_call(self)
        del self.call_output

    # ---- records

    @property
    def delivered(self) -> int:
        """Number of tokens whose text was delivered to the caller, wholly or in part."""
        return self.pieces.delivered

    @property
    def tool_parser(self) -> str:
        """Name of the tool parser (one of vLLM's) with which the worker parses the output; "" if there is none."""
        return "" if self.parsed_text is None else self.parsed_text.parsers.tool_parser
