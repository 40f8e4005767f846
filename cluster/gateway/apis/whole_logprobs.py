"""Log probabilities of an answer that is sent as a whole.

Problem: the log probabilities of one answer may take seconds to encode, which would block the event loop, and as Python
objects they take several KB per token. So they are encoded while the model generates, in slices of time, and an open
call keeps only the encoded bytes. MAX_LOGPROBS in calls/request.py bounds the number of log probabilities of a call,
and the budget for answers (unread_answers.py) the memory of all calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final, Protocol

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, UnreadAnswer
from cluster.gateway.text.logprobs import TokenLogprob

BLOCK_BYTES: Final = 65_536
"""Number of bytes from which a block of encoded log probabilities is not extended further."""
COUNTED_TOKENS: Final = 64
"""Number of encoded tokens after which the memory of the answer is counted again."""


class EncodedList:
    """Encoded items with a separator between them, joined in blocks of about BLOCK_BYTES. `size`: approximate number of
    bytes."""

    __slots__ = ("_last", "_separator", "blocks", "size")

    def __init__(self, separator: bytes = b"") -> None:
        self._separator = separator
        self.blocks: list[bytes | bytearray] = []
        self._last = bytearray()
        self.size = 0

    def add(self, item: bytes) -> None:
        """Append an item."""
        blocks = self.blocks
        self.size += len(item) + 1
        last = self._last
        if len(last) >= BLOCK_BYTES:
            blocks[-1] = bytes(last)  # without the memory into which it could grow
            self._last = last = bytearray()
            blocks.append(last)
        elif not blocks:
            last += item
            blocks.append(last)
            return
        last += self._separator
        last += item


class ChoiceLogprobs(Protocol):
    """Encoder of the log probabilities of one choice in the form of one API."""

    @property
    def size(self) -> int:
        """Approximate number of encoded bytes."""

    def add(self, t: TokenLogprob) -> None:
        """Add the next token of the choice."""

    def parts(self) -> list[bytes | bytearray]:
        """Return the encoded log probabilities of all tokens, in parts."""


class WholeAnswer:
    """The answer to one call: its pieces, one for each choice, and the encoded log probabilities of each choice."""

    def __init__(self, call: Call, encoder: Callable[[], ChoiceLogprobs], unread: UnreadAnswer) -> None:
        """`encoder`: returns a new encoder for the log probabilities of one choice. `unread`: counts the answer."""
        self._call = call
        self._unread = unread
        self.logprobs = [encoder() for _ in call.sequences]
        self.pieces: list[Piece] = []
        """The pieces, without log probabilities. Empty until `gather` has returned."""

    async def gather(self) -> None:
        """Wait for the end of the call, and encode the log probabilities as they arrive. Raises the call's error, and
        CallError if the budget has no room for the answer."""
        output = self._call.output
        await in_slices(self._encode_arrived())
        while not output.finished and output.error is None:
            await output.news()
            await in_slices(self._encode_arrived())
        pieces = await output.all_pieces()
        # What guards have held back to the end.
        await in_slices(chain.from_iterable(self._encode(piece.index, list(piece.logprobs)) for piece in pieces))
        for piece in pieces:
            piece.logprobs = ()
        self.pieces = pieces
        size = self.size
        self._unread.grow(size)
        self._unread.shrink(size)

    @property
    def size(self) -> int:
        """Approximate memory of the answer in bytes."""
        encoded = sum(choice.size for choice in self.logprobs) + sum(piece.chars for piece in self.pieces)
        return max(encoded + self._call.output.unread_logprobs * LOGPROB_BYTES, 1)

    def _encode_arrived(self) -> Iterator[None]:
        """Remove the log probabilities that have arrived from the sequences, and encode them as `_encode` does."""
        for sequence in self._call.sequences:
            buffer = sequence.pieces
            if arrived := buffer.logprobs:
                buffer.logprobs = []
                yield from self._encode(sequence.index, arrived)

    def _encode(self, index: int, logprobs: list[TokenLogprob]) -> Iterator[None]:
        """Encode log probabilities of a choice, one token in each step of the returned iterator. The list is emptied
        meanwhile, because freeing many tokens at once would block the event loop."""
        logprobs.reverse()
        position_bytes = (1 + len(logprobs[0].top)) * LOGPROB_BYTES if logprobs else 0
        while logprobs:
            self.logprobs[index].add(logprobs.pop())
            if len(logprobs) % COUNTED_TOKENS == 0:
                self._unread.grow(self.size + len(logprobs) * position_bytes)
            yield
