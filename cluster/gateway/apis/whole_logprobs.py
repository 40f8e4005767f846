"""Log probabilities of an answer that is sent as a whole.

Problem: the log probabilities of one answer may take seconds to encode, which would block the event loop, and as Python
objects they take several KB per token. So they are encoded while the model generates, in slices of time, and an open
call keeps only the encoded bytes. MAX_LOGPROBS in calls/request.py bounds the number of log probabilities of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final, Protocol

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.text.logprobs import TokenLogprob

BLOCK_BYTES: Final = 65_536
"""Number of bytes from which a block of encoded log probabilities is not extended further."""


class EncodedList:
    """Encoded items with a separator between them, joined in blocks of about BLOCK_BYTES."""

    __slots__ = ("_separator", "blocks")

    def __init__(self, separator: bytes = b"") -> None:
        self._separator = separator
        self.blocks: list[bytearray] = []

    def add(self, item: bytes) -> None:
        """Append an item."""
        blocks = self.blocks
        if not blocks:
            blocks.append(bytearray(item))
            return
        if len(blocks[-1]) >= BLOCK_BYTES:
            blocks.append(bytearray())
        blocks[-1] += self._separator
        blocks[-1] += item


class ChoiceLogprobs(Protocol):
    """Encoder of the log probabilities of one choice in the form of one API."""

    def add(self, t: TokenLogprob) -> None:
        """Add the next token of the choice."""

    def parts(self) -> list[bytes | bytearray]:
        """Return the encoded log probabilities of all tokens, in parts."""


class WholeAnswer:
    """The answer to one call: its pieces, one for each choice, and the encoded log probabilities of each choice."""

    def __init__(self, call: Call, encoder: Callable[[], ChoiceLogprobs]) -> None:
        """`encoder`: returns a new encoder for the log probabilities of one choice."""
        self._call = call
        self.logprobs = [encoder() for _ in call.sequences]
        self.pieces: list[Piece] = []
        """The pieces, without log probabilities. Empty until `gather` has returned."""

    async def gather(self) -> None:
        """Wait for the end of the call, and encode the log probabilities as they arrive. Raises the call's error."""
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

    @property
    def size(self) -> int:
        """Number of bytes of the encoded log probabilities."""
        return sum(len(part) for choice in self.logprobs for part in choice.parts())

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
        while logprobs:
            self.logprobs[index].add(logprobs.pop())
            yield
