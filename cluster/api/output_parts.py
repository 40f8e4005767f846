"""The parts of a parsed output (content, reasoning, tool calls), and the request to a worker to parse an output."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class OutputParsing:
    """A request to the worker: parse the output of a chat into reasoning, content and tool calls."""

    request: str
    """JSON object with the fields of the chat request that parsers read. The names are OpenAI's: `tools`,
    `tool_choice`, `parallel_tool_calls`, `chat_template_kwargs`, `reasoning_effort`."""
    stop: tuple[str, ...] = ()
    """Stop strings. The worker searches the output for them, since a parsed output has no plain text."""
    is_whole: bool = False
    """Whether the caller gets the answer in one message, not streamed. The output is then parsed once, at its end."""
    needs_tools: bool = False
    """Whether the request must be refused if the worker has no parser for tool calls."""


class PartKind(enum.IntEnum):
    """Kind of a part of a parsed output. The numbers are those of link.v1 OutputPart.Kind."""

    CONTENT = 1
    REASONING = 2
    TOOL_NAME = 3
    """A tool call begins; the text is the name of the function."""
    TOOL_ARGUMENTS = 4
    """A fragment of the arguments of a tool call, as JSON text."""


class OutputPart(NamedTuple):
    """A part of a parsed output. `call`: index of the tool call in the output, from 0; 0 for other kinds."""

    kind: PartKind
    text: str
    call: int = 0


@dataclass(slots=True)
class ParsedOutput:
    """The parts that the worker's parser found in one TokenOutput's text, and the stop string that ended the text, if
    any. Not frozen, since an instance is created for each token.

    The joined parts of a request's outputs depend only on the request's tokens, not on how the engine's steps divided
    the tokens. The first parsed output of a resumed request also repeats the parts of the tokens that were emitted
    before the resume.
    """

    parts: Sequence[OutputPart] = ()
    stop_string: str = ""
    """The stop string that ended the output; "" if no stop string ended it. An output with a stop string has no tokens
    after the stop string."""
    reasoning_tokens: int = 0
    """Number of reasoning tokens so far, set when the output has ended."""


def merge_parts(parts: Iterable[tuple[int, str, int]]) -> list[OutputPart]:
    """Return the parts after joining neighbours of the same kind and tool call. Names of tool calls are never joined,
    since each name begins a call.

    Each item of `parts` is an OutputPart, or a tuple of its kind, text and call.
    """
    out: list[OutputPart] = []
    for kind, text, call in parts:
        last = out[-1] if out else None
        if last is not None and kind != PartKind.TOOL_NAME and (last.kind, last.call) == (kind, call):
            out[-1] = OutputPart(last.kind, last.text + text, call)
        else:
            out.append(OutputPart(PartKind(kind), text, call))
    return out
