"""The output of one sequence, which the worker has parsed into content, reasoning and tool calls. The interface equals
the detokenizer's, with one addition: `pop_parts` returns the parts of the text that was popped last.

A worker without a parser sends no parts. Then the tokens go through the plain detokenizer, and the output is one text.
The first output of the sequence decides this for the whole sequence.

A worker that continues a sequence sends the parts of all emitted tokens again. All workers make the same parts of the
same tokens. So the gateway skips as many characters of these parts as it has received before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind, merge_parts
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.worker_parsers import WorkerParsers

GUARD = "guard"


class PartFilter(Protocol):
    """The guards of a parsed output: checks that may change or end the output."""

    refused: bool
    """Whether a guard has ended the output."""

    def feed(self, parts: Sequence[OutputPart], last: bool) -> list[OutputPart]:
        """Add parts. Returns the parts that the guards release. `last`: whether the output ends with these parts; the
        guards then hold back nothing."""


class ParsedText:
    """The text and the parts of one sequence, made from the output of the worker's parser. If the worker has no parser,
    the text comes from the text source `inner`, which detokenizes the output."""

    __slots__ = (
        "_filter",
        "_include_reasoning",
        "_inner",
        "_last_popped",
        "_new",
        "_parsed",
        "_popped_tokens",
        "_received_chars",
        "_restored",
        "has_tool_call",
        "parsers",
        "token_ids",
    )

    def __init__(self, inner: TextSource, guards: PartFilter | None = None, *, include_reasoning: bool = True) -> None:
        self._inner = inner
        self._filter = guards
        self._include_reasoning = include_reasoning
        self._parsed: bool | None = None
        """Whether the worker parses the output; None before the first output."""
        self._restored: tuple[Sequence[int], int] | None = None
        self._received_chars = 0
        """Number of characters in the parts that were received, or that another gateway has delivered."""
        self._new: list[OutputPart] = []
        """Parts that the guards have released and `pop_text` has not returned yet."""
        self._last_popped: list[OutputPart] = []
        self._popped_tokens = 0
        """Number of tokens whose parts `pop_text` has returned or another gateway has delivered."""
        self.has_tool_call = False
        """Whether the output has a tool call."""
        self.token_ids = inner.token_ids
        self.parsers = WorkerParsers()
        """The parsers of the output's workers."""

    # ---- from the worker

    def push_parsed(
        self, token_ids: Sequence[int], parsed: ParsedOutput | None, stop_terminated: bool, begins: bool
    ) -> str | None:
        """Add the tokens of a step. `parsed`: what the worker's parser made of the tokens, None without a parser.
        `begins`: whether this is the first output that a worker sends for the sequence. If a stop string has ended the
        output, returns that stop string; if a guard has ended it, returns GUARD; else None."""
        if self._parsed is None:
            self._choose(parsed is not None)
        if not self._parsed:
            return self._inner.push(token_ids, stop_terminated)
        self.token_ids += token_ids
        if parsed is None:
            return None
        parts = parsed.parts
        if begins:  # tool names that were delivered before count, too
            self.has_tool_call |= any(part.kind is PartKind.TOOL_NAME for part in parts)
            parts = _without_chars(parts, self._received_chars)
        self._received_chars += sum(len(part.text) for part in parts)
        self._add(parts, False)
        return GUARD if self.refused else parsed.stop_string or None

    def push(self, token_ids: Sequence[int], stop_terminated: bool = False) -> str | None:
        """Add the tokens of a step for which the worker has sent no parts. Implements TextSource."""
        return self.push_parsed(token_ids, None, stop_terminated, False)

    def _choose(self, parsed: bool) -> None:
        self._parsed = parsed
        if self._restored is not None and not parsed:
            token_ids, chars = self._restored
            del self.token_ids[:]
            self._inner.restore(token_ids, chars)

    def _add(self, parts: Sequence[OutputPart], last: bool) -> None:
        if self._filter is not None:
            parts = self._filter.feed(parts, last)
        for part in parts:
            if part.kind is PartKind.TOOL_NAME:
                self.has_tool_call = True
            elif part.kind is PartKind.REASONING and not self._include_reasoning:
                continue
            self._new.append(part)

    def restore(self, token_ids: Sequence[int], chars: int) -> None:
        """Continue an output that another gateway has begun. `token_ids`: the output's tokens so far. `chars`: number
        of characters that the other gateway has delivered, counted in the text or in the parsed parts of these tokens.
        Raises ValueError if the output has guards."""
        if self._filter is not None:
            raise ValueError("its tenant's guards hold its text")
        self._restored = tuple(token_ids), chars
        self._received_chars = chars
        self.token_ids += token_ids
        self._popped_tokens = len(self.token_ids)

    # ---- to the API

    @property
    def is_parsed(self) -> bool:
        """Whether a worker has begun to parse the output."""
        return bool(self._parsed)

    @property
    def has_parts(self) -> bool:
        """Whether a part other than content waits for `pop_text`."""
        return any(part.kind is not PartKind.CONTENT for part in self._new)

    def pop_text(self, finished: bool) -> str:
        """Return the content since the last call of `pop_text`. `finished`: whether the output has ended."""
        if not self._parsed:
            self._last_popped = []
            return self._inner.pop_text(finished)
        if finished and not self.refused:
            self._add((), True)
        self._last_popped, self._new = merge_parts(self._new), []
        self._popped_tokens = len(self.token_ids)
        return "".join(part.text for part in self._last_popped if part.kind is PartKind.CONTENT)

    def pop_parts(self) -> Sequence[OutputPart]:
        """Return all parts that the last call of `pop_text` has popped, including the content; empty if the output is
        not parsed."""
        parts, self._last_popped = self._last_popped, []
        return parts

    @property
    def searches_text(self) -> bool:
        """Whether every token must go through `push`. True for a parsed output, since a token alone has no text."""
        return self._parsed is not False or self._inner.searches_text

    @property
    def refused(self) -> bool:
        """Whether a guard has ended the output."""
        return self._filter.refused if self._parsed and self._filter is not None else self._inner.refused

    @property
    def pending_chars(self) -> int:
        """Number of characters that `pop_text` has not returned yet."""
        return sum(len(part.text) for part in self._new) if self._parsed else self._inner.pending_chars

    def pending_tokens(self) -> int:
        """Return the number of tokens at the end of the sequence for which `pop_text` has returned no text or part
        yet."""
        if self._parsed is False:
            return self._inner.pending_tokens()
        return len(self.token_ids) - self._popped_tokens

    def text_of(self, token_id: int) -> str:
        """Add one token and return its text. Allowed only for an output that is not parsed."""
        return self._inner.text_of(token_id)

    @property
    def passes_content(self) -> bool:
        """Whether `pass_content` may be called. It may be called while nothing waits for `pop_text` and no guard reads
        the parts."""
        return bool(self._parsed) and self._filter is None and not self._new

    def pass_content(self, token_id: int, text: str) -> None:
        """Add one token of a parsed output. `text`: the token's content, which `pop_text` does not return, because the
        code that calls this method delivers it. The token must have no other parts."""
        self.token_ids.append(token_id)
        self._received_chars += len(text)
        self._popped_tokens = len(self.token_ids)

    def push_back(self, text: str) -> None:
        """Take back the text of the last token, because it could not be sent. `text_of` has returned this text, or
        `pass_content` was called with it."""
        if self._parsed:
            self._new.append(OutputPart(PartKind.CONTENT, text))
            self._popped_tokens -= 1
        else:
            self._inner.push_back(text)


def _without_chars(parts: Sequence[OutputPart], chars: int) -> Sequence[OutputPart]:
    """Return the parts without their first `chars` characters."""
    for at, part in enumerate(parts):
        if chars < len(part.text):
            return [OutputPart(part.kind, part.text[chars:], part.call), *parts[at + 1 :]] if chars else parts[at:]
        chars -= len(part.text)
    return ()
