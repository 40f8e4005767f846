"""Encoding of a stream of pieces as the server-sent events of Anthropic's API.

Problem: each token of a text is an event, and encoding a dictionary for each token would cost more than sending the
token. Method: the JSON around the text of a delta is rendered once for each content block. All output is ASCII, for the
reason given in openai/answers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.apis.anthropic import answers
from cluster.gateway.apis.openai.answers import keep_alive
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.keepalive import CallProgress, ProgressOf
from cluster.gateway.calls.sequences.pieces import Piece

PING: Final = b'event: ping\ndata: {"type":"ping"}\n\n'
STOP: Final = 'event: message_stop\ndata: {"type":"message_stop"}\n\n'

_encode = json.JSONEncoder(separators=(",", ":")).encode
_escape = json.encoder.encode_basestring_ascii  # the C function that the encoder uses for strings
_DELTAS: Final[Mapping[PartKind, tuple[str, str]]] = {
    PartKind.CONTENT: ("text_delta", "text"),
    PartKind.REASONING: ("thinking_delta", "thinking"),
    PartKind.TOOL_ARGUMENTS: ("input_json_delta", "partial_json"),
}
_EMPTY_BLOCKS: Final[Mapping[PartKind, Mapping[str, Any]]] = {
    PartKind.CONTENT: {"type": "text", "text": ""},
    PartKind.REASONING: {"type": "thinking", "thinking": "", "signature": ""},
}
_DELTA_END: Final = "}}\n\n"


def event(name: str, **fields: Any) -> str:
    """Return a server-sent event. `name`: the name of the event and the `type` in its data. `fields`: the other fields
    of the data."""
    return f"event: {name}\ndata: {_encode({'type': name, **fields})}\n\n"


def _delta_start(kind: PartKind, index: int) -> str:
    """Return the beginning of a delta event, up to the place where the text of the part is inserted. `index`: position
    of the content block."""
    type_, field = _DELTAS[kind]
    data = _encode({"type": "content_block_delta", "index": index, "delta": {"type": type_, field: ""}})
    return "event: content_block_delta\ndata: " + data.removesuffix('""}}')


class BlockEvents:
    """The events of an answer's content blocks. One block is open at a time."""

    def __init__(self, tool_id: answers.ToolId) -> None:
        self._tool_id = tool_id
        self._open: PartKind | None = None
        """Kind of the parts of the open block; TOOL_ARGUMENTS for a tool call."""
        self._next = 0
        """Position of the next block."""
        self._start = ""
        """Beginning of each delta event of the open block, up to the place where the text of the part is inserted."""
        self._of_call: dict[int, int] = {}
        """Position of each tool call's block, keyed by the number of the tool call."""
        self._last_call = 0
        self.last_arguments: list[str] = []
        """Fragments of the arguments of the last tool call."""

    @property
    def in_text(self) -> bool:
        """Whether the open block is a text, so that `text` may be called."""
        return self._open is PartKind.CONTENT

    def text(self, text: str) -> str:
        """Return the event that adds a text to the open block."""
        return self._start + _escape(text) + _DELTA_END

    def parts(self, parts: Iterable[OutputPart]) -> str:
        """Return the events for the next parts of the output."""
        return "".join(map(self._part, parts))

    def close(self) -> str:
        """Return the events that end the open block, if there is one."""
        if self._open is None:
            return ""
        index, signed = self._next - 1, ""
        if self._open is PartKind.REASONING:
            signed = event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
        self._open = None
        return signed + event("content_block_stop", index=index)

    def _part(self, part: OutputPart) -> str:
        kind = part.kind
        if kind is PartKind.TOOL_NAME:
            self._of_call[part.call] = self._next
            self._last_call, self.last_arguments = part.call, []
            block = {"type": "tool_use", "id": self._tool_id(part), "name": part.text, "input": {}}
            return self._begin(PartKind.TOOL_ARGUMENTS, block)
        if not part.text:
            return ""
        if kind is PartKind.TOOL_ARGUMENTS:
            index = self._of_call[part.call]
            if part.call == self._last_call:
                self.last_arguments.append(part.text)
            if self._open is kind and index == self._next - 1:
                return self.text(part.text)
            # A parser that adds to an earlier call: clients find the block by its index.
            return _delta_start(kind, index) + _escape(part.text) + _DELTA_END
        begun = "" if self._open is kind else self._begin(kind, _EMPTY_BLOCKS[kind])
        return begun + self.text(part.text)

    def _begin(self, kind: PartKind, block: Mapping[str, Any]) -> str:
        ended, index = self.close(), self._next
        self._open, self._next, self._start = kind, index + 1, _delta_start(kind, index)
        return ended + event("content_block_start", index=index, content_block=block)


class MessageEvents:
    """The events of one answer, made of the pieces of the call's only sequence."""

    def __init__(self, head: Mapping[str, Any], usage: Callable[[], CallUsage], tool_id: answers.ToolId) -> None:
        """`head`: the fields that answers.message_head returns. `usage`: returns the usage of the call so far.
        `tool_id`: returns the id of the tool call that a part belongs to."""
        self._head = head
        self._usage = usage
        self._blocks = BlockEvents(tool_id)
        self._started = False
        self._last: Piece | None = None

    @property
    def in_text(self) -> bool:
        """Whether the open content block is a text, so that `text` may be called."""
        return self._blocks.in_text

    def text(self, text: str) -> bytes:
        """Return the event of a piece that holds only a text."""
        return self._blocks.text(text).encode("ascii")

    def pieces(self, pieces: Iterable[Piece]) -> bytes:
        """Return the events for the next pieces of the output."""
        return "".join(map(self._piece, pieces)).encode("ascii")

    def _piece(self, piece: Piece) -> str:
        begun = "" if self._started else self._message_start()
        body = self._blocks.parts(answers.parts_of(piece))
        if piece.finish_reason:
            self._last = piece
            body += self._blocks.close()
        return begun + body

    def _message_start(self) -> str:
        """Return the first event of the stream. It holds the counts of prompt and cached tokens, which are not known
        before the first output."""
        self._started = True
        unknown: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **unknown, "usage": answers.usage_of(self._usage())}
        return event("message_start", message=message)

    def end(self) -> bytes:
        """Return the events after the last piece."""
        assert self._last is not None, "the call has not ended"
        reason, sequence = answers.stop_of(self._last, self._blocks.last_arguments)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return (event("message_delta", delta=delta, usage=answers.final_usage(self._usage())) + STOP).encode("ascii")


class MessageEncoder:
    """Encodes the pieces of a call as the events of one answer. Implements calls.stream_writer.ChunkEncoder."""

    __slots__ = ("_call", "_events", "_output", "_progress", "encode_text", "end", "ended")

    def __init__(self, call: Call, progress: ProgressOf) -> None:
        self.ended = False
        self._call = call
        self._output = call.output
        self._progress = progress
        self._events = MessageEvents(answers.message_head(call), lambda: call.usage, answers.tool_ids(call))
        self.encode_text = self._events.text
        self.end = self._events.end

    @property
    def plain(self) -> bool:
        """Whether `encode_text` can encode the next tokens, because the open content block is a text. Implements
        ChunkEncoder."""
        return self._events.in_text

    def encode_new(self) -> bytes:
        """Return the events of everything that is new in the call, or a ping if a keep-alive is due; b"" if nothing is
        to be sent. Implements ChunkEncoder."""
        output = self._output
        if self.plain and (text := output.pop_text()) is not None:
            return self.encode_text(text) if text else b""
        pieces = output.pop_pieces()
        if pieces:
            self.ended = output.end_delivered
            return self._events.pieces(pieces)
        if output.pop_keepalive():
            return ping(self._progress(self._call))
        return b""


def ping(progress: CallProgress) -> bytes:
    """Return the event that shows that a call is alive. If the model is still starting, a comment with the progress of
    the start comes before the event."""
    return PING if not progress.eta_s else keep_alive(progress).removesuffix(b"\n") + PING
