"""Limits for the chats that gateways send to workers to be rendered, and the pieces in which the rendered prompts
return.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.codec import wire_text

MAX_CHAT_BYTES = 16 << 20
"""Maximum size of a chat, in bytes of JSON."""
MAX_OUTSTANDING = 2
"""Maximum number of chats of one link that are sent but not yet answered: the one being rendered, and the next."""
INLINE_CHAT_BYTES = 32_768
"""Size in bytes above which a chat is sent on the Bulk stream, so that no large message delays a token."""
PIECE_BYTES = 32_768
"""Maximum size in bytes of the ids in one message of a worker, so that no large message delays a token. A multiple of
the size of an id."""


class RenderedPieces:
    """The prompts that a worker has rendered for a gateway, cut into pieces of PIECE_BYTES bytes, which are sent in
    order."""

    def __init__(self) -> None:
        self._pieces: deque[pb.Rendered] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, answer: pb.Rendered) -> None:
        """Add a rendered prompt, and cut its token ids into pieces."""
        ids = answer.token_ids
        answer.message, answer.field = wire_text(answer.message), wire_text(answer.field)
        starts = range(0, max(len(ids), 1), PIECE_BYTES)
        for at in starts[:-1]:
            piece = pb.Rendered(number=answer.number, token_ids=ids[at : at + PIECE_BYTES], more=True)
            self._pieces.append(piece)
        answer.token_ids = ids[starts[-1] :]
        self._pieces.append(answer)

    def next_message(self) -> Sequence[pb.Rendered]:
        """Remove and return the pieces for one message: at least one piece, and at most PIECE_BYTES bytes of token
        ids."""
        taken: list[pb.Rendered] = []
        size = 0
        while self._pieces:
            size += len(self._pieces[0].token_ids)
            if taken and size > PIECE_BYTES:
                break
            taken.append(self._pieces.popleft())
        return taken


class JoinedPieces:
    """The token ids of one rendered prompt, joined from the pieces that a worker sends."""

    def __init__(self, max_tokens: int) -> None:
        self._max_bytes = 4 * max_tokens
        self._ids = bytearray()

    def add(self, piece: pb.Rendered) -> None:
        """Add a piece. Raises ValueError if the prompt now has more than `max_tokens` ids, or if the piece ends within
        an id."""
        self._ids += piece.token_ids
        if len(self._ids) > self._max_bytes or len(piece.token_ids) % 4:
            raise ValueError(f"{len(self._ids)} bytes of ids for a prompt of at most {self._max_bytes}")

    @property
    def ids(self) -> bytes:
        """The packed token ids of the pieces that were added so far."""
        return bytes(self._ids)
