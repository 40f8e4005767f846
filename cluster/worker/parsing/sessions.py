"""The records that a worker keeps of its parser sessions, one session for each parsed request.

If the parser process is lost, a session can begin anew in another process from its record.
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.api.output_parts import OutputParsing, OutputPart, ParsedOutput
from cluster.api.types import EngineRequest, FinishReason, Grammar, TokenOutput
from cluster.worker.parsing import wire

_NOTHING = ParsedOutput()


@dataclass(slots=True, eq=False)
class SessionRecord:
    """A request whose output is parsed.

    `ids`: all tokens of the output, including those emitted earlier. `sent`: number of `ids` that were sent to the
    parser, or are about to be sent. `answered`: number of `ids` whose parts the parser has returned. `pending`:
    outputs that were sent and are not answered yet. Each has the number of `ids` up to the end of this output.
    """

    number: int
    request: EngineRequest
    parsing: OutputParsing
    opened: asyncio.Future[wire.Opened]
    ids: array[int] = field(default_factory=lambda: array("I"))
    answered: int = 0
    sent: int = 0
    delivered_chars: int = 0
    """Number of characters of the parts that have come back."""
    repeated_chars: int = 0
    """Number of characters at the beginning of the next answer that were delivered before the session began anew."""
    pending: deque[tuple[TokenOutput, int]] = field(default_factory=deque)
    has_ended: bool = False
    """Whether the request's last output has been returned."""
    deaths: int = 0
    """Number of processes that have ended while they worked on this session."""

    @classmethod
    def of(cls, number: int, request: EngineRequest, parsing: OutputParsing) -> SessionRecord:
        """Return the record of a new session."""
        record = cls(number, request, parsing, asyncio.get_running_loop().create_future())
        record.ids.extend(request.emitted_token_ids)
        record.answered = record.sent = len(record.ids)
        return record

    def opening(self) -> wire.Open:
        """Return the message that begins the session in the parser process.

        If the parser process is replaced, this message also begins the session in the new process. It then holds the
        tokens whose parts were returned already, and the new process continues after these tokens.
        """
        sampling = self.request.sampling
        self.repeated_chars = self.delivered_chars
        return wire.Open(
            self.number,
            self.parsing.request,
            self.parsing.stop,
            self.parsing.is_whole,
            wire.pack_ids(self.request.prompt_token_ids),
            self.ids[: self.answered].tobytes(),
            sampling.min_tokens,
            None if sampling.grammar is None else _grammar_text(sampling.grammar),
        )

    def take(self, output: TokenOutput) -> tuple[int, bytes, int] | None:
        """Record an output of the engine. Returns the item for the next Feed message to the parser process.

        The item has all tokens that are not sent yet. It is None if the output needs no parsing yet: the answer is
        parsed as a whole, has no stop strings and does not end with this output. `output` then has no parts and can be
        sent to the gateway.
        """
        self.ids.extend(output.token_ids)
        if self.parsing.is_whole and not self.parsing.stop and output.finish is None:
            output.parsed = _NOTHING
            return None
        begin, self.sent = self.sent, len(self.ids)
        self.pending.append((output, self.sent))
        return self._item(output, begin, self.sent)

    def again(self) -> list[tuple[int, bytes, int]]:
        """Return the outputs that the parser has not answered yet, as items of a Feed message.

        A new parser process gets these items.
        """
        items, begin = [], self.answered
        for output, end in self.pending:
            items.append(self._item(output, begin, end))
            begin = end
        return items

    def _item(self, output: TokenOutput, begin: int, end: int) -> tuple[int, bytes, int]:
        return self.number, self.ids[begin:end].tobytes(), _state(output.finish)

    def answer(self, parsed: wire.Parsed) -> TokenOutput:
        """Add the parser's result to the oldest pending output, and return this output. An output is pending from the
        time it is sent to the parser until this method is called for it."""
        output, self.answered = self.pending.popleft()
        if parsed.error:
            return failed(output.request_id, f"the output could not be parsed: {parsed.error}")
        if not parsed.parts and output.finish is None and not parsed.stop:
            output.parsed = _NOTHING
            return output
        output.parsed = ParsedOutput(self._new_parts(parsed.parts), parsed.stop, parsed.reasoning_tokens)
        if parsed.stop:
            output.token_ids = output.token_ids[: parsed.kept]
            output.logprobs = None if output.logprobs is None else output.logprobs[: parsed.kept]
            output.finish, output.stop_token_id = FinishReason.STOP, None
        return output

    def _new_parts(self, given: Sequence[OutputPart]) -> Sequence[OutputPart]:
        """Return the parts without the text that was already delivered before the session was started again.

        A session that is started again parses its earlier tokens again. They give the same text, but possibly divided
        into parts differently. So characters are counted, not parts.
        """
        if not self.repeated_chars:
            for _, text, _ in given:
                self.delivered_chars += len(text)
            return given
        parts = []
        repeated, self.repeated_chars = self.repeated_chars, 0
        for kind, text, call in given:
            new = text[repeated:]
            repeated -= min(repeated, len(text))
            if new:
                parts.append(OutputPart(kind, new, call))
                self.delivered_chars += len(new)
        return parts


def failed(request_id: str, message: str) -> TokenOutput:
    """Return the last output of a request whose output cannot be parsed: an error with `message`."""
    return TokenOutput(request_id, (), FinishReason.ERROR, message=message)


def _state(finish: FinishReason | None) -> int:
    match finish:
        case None:
            return wire.RUNS
        case FinishReason.STOP:
            return wire.STOPPED
        case FinishReason.ERROR:
            return wire.FAILED
        case _:
            return wire.ENDED


def _grammar_text(grammar: Grammar) -> wire.GrammarText:
    if isinstance(grammar.value, str):
        return wire.GrammarText(grammar.kind, grammar.value)
    return wire.GrammarText(grammar.kind, values=tuple(grammar.value))
