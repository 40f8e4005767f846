"""Messages between the worker and its parser process, sent over a stream socket: the length, then the message in
msgpack.

Both sides are processes of one worker. So if a message cannot be decoded, this is a bug, and the process ends. Token
ids are packed with four bytes each.
"""

from __future__ import annotations

import socket
import struct
from array import array
from collections.abc import Sequence

import msgspec

from cluster.api.output_parts import OutputPart

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 256 << 20

RUNS, STOPPED, ENDED, FAILED = range(4)
"""State of a feed item's request: it runs on; it has ended by a stop token, whose text is not output; it has
ended in another way; it has failed, and its output is not parsed."""

Part = tuple[int, str, int]
"""Kind, text and call of an OutputPart. A tuple is encoded like an OutputPart, and is created in less time."""


class GrammarText(msgspec.Struct, array_like=True, frozen=True):
    """A grammar as text. `values`: the allowed strings of a grammar of kind `choice`."""

    kind: str
    value: str = ""
    values: tuple[str, ...] = ()


class Open(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Message to the parser process: begin session `number`, which parses the output of one request.

    `request`, `stop` and `is_whole` have the same meaning as in OutputParsing. `prompt`: packed token ids of
    the prompt. `emitted`: packed ids of the tokens that a resumed request has emitted already. The session's
    first answer includes the parts of these tokens.
    """

    number: int
    request: str
    stop: tuple[str, ...]
    is_whole: bool
    prompt: bytes
    emitted: bytes
    min_tokens: int
    grammar: GrammarText | None


class Feed(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Message to the parser process with the outputs of one engine step.

    Each of the `items` is the output of one request: the number of its parser session, the packed token ids, and the
    output's state (RUNS, STOPPED, ENDED or FAILED).
    """

    items: list[tuple[int, bytes, int]]


class Close(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Message to the parser: end a session."""

    number: int


class Render(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Message to the renderer: render a chat.

    `chat`: JSON with the FIELDS of rendering/kit.py. `max_tokens`: largest number of token ids in the reply.
    """

    number: int
    chat: bytes
    max_tokens: int


class Ready(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """Message that a parser or renderer process sends after its start. `error`: why it could not load its parsers or
    its renderer; empty if it has loaded them."""

    error: str = ""


class Opened(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Reply to Open: the session has begun, or `error` says why not. `field`: the wrong field of the request.

    `grammar`: the grammar that replaces the request's own grammar; None to keep the request's own. `reasoning_ended`:
    whether the reasoning has ended before the output begins; None if the session has no parser for reasoning.
    """

    number: int
    grammar: GrammarText | None = None
    reasoning_ended: bool | None = None
    template_kwargs: str = ""
    error: str = ""
    field: str = ""


class Parsed(msgspec.Struct, array_like=True, frozen=True):
    """The parts that the parser process made of one item of a Feed message (one request's output of one engine step).

    `number`: number of the parser session. `stop`: the stop string that was found; "" if none was found. `kept`: number
    of the item's token ids up to the end of the stop string, or of all its token ids if no stop string was found.
    """

    number: int
    parts: Sequence[OutputPart]
    kept: int
    stop: str = ""
    reasoning_tokens: int = 0
    error: str = ""


class ParsedStep(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """The parser process's reply to a Feed message. It has one result for each item of the message whose session is
    known, in the order of the items."""

    items: list[Parsed]


class Rendered(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """Reply to Render: the packed ids of the prompt (`ids`) and their number (`tokens`). `ids` is empty if `tokens` is
    greater than Render.max_tokens.

    `error`: why there is no prompt. `field`: the wrong field of the chat; "" if no field is wrong.
    """

    number: int
    ids: bytes = b""
    tokens: int = 0
    error: str = ""
    field: str = ""


Request = Open | Feed | Close | Render
Reply = Ready | Opened | ParsedStep | Rendered
_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Return token ids as bytes, four bytes for each id."""
    return array("I", token_ids).tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """Return the token ids that `pack_ids` has packed."""
    ids = array("I")
    ids.frombytes(packed)
    return ids.tolist()


def encode(message: Request | Reply) -> bytes:
    """Encode a message, and put its length before it."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def decode_reply(body: bytes) -> Reply:
    """Decode a message of the parser process. `body`: the message without its length prefix. Raises
    msgspec.MsgspecError."""
    return _replies.decode(body)


def receive_request(sock: socket.socket) -> Request | None:
    """Wait for the worker's next message and return it; None if the worker has closed the connection."""
    head = _read(sock, LENGTH.size)
    if head is None:
        return None
    body = _read(sock, LENGTH.unpack(head)[0])
    return None if body is None else _requests.decode(body)


def _read(sock: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        more = sock.recv(min(size - len(received), 1 << 20))
        if not more:
            return None
        received += more
    return bytes(received)
