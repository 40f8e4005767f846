"""Bounds on the log probabilities in one chunk of a stream.

Problem: tokens that arrive while a client does not read are sent in one piece. With log probabilities, such a piece may
have many MB: encoding it would block the event loop for seconds, and gRPC clients refuse messages above 4 MB.
"""

from __future__ import annotations

import asyncio
from typing import Final

from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.pieces import Piece

MAX_CHUNK_LOGPROBS: Final = 2048
"""Maximum number of log probabilities in a chunk, alternatives included. This is above the number that one step of
MAX_N sequences with MAX_TOP_LOGPROBS alternatives brings, and encoding it takes a few milliseconds."""


class LogprobCuts:
    """Source of the pieces of a streamed call with log probabilities. If more log probabilities wait than a chunk may
    hold, pieces that hold only log probabilities come first, and the text, the parts and the end come with the last
    ones. So the delivered text never runs ahead of the delivered log probabilities, as resume tokens require."""

    __slots__ = ("_begun", "_call")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._begun: set[int] = set()
        """Indexes of the sequences that have had a piece."""

    def pop_pieces(self) -> list[Piece]:
        """Return the next pieces, as CallOutput.pop_pieces does. If these pieces hold only a part of the log
        probabilities that wait, the API is notified again. Raises the call's error."""
        begun = self._begun
        pieces = self._cut()
        if pieces:
            asyncio.get_running_loop().call_soon(self._call.output.wake)  # later, since the API is in the middle of it
        else:
            pieces = self._call.output.pop_pieces()
            for piece in pieces:
                piece.first = piece.first and piece.index not in begun
        begun.update(piece.index for piece in pieces)
        return pieces

    def _cut(self) -> list[Piece]:
        """Remove as many log probabilities as a chunk may hold, and return them as pieces. Returns [] if no more than
        that wait."""
        pieces: list[Piece] = []
        left = MAX_CHUNK_LOGPROBS
        for sequence in self._call.sequences:
            waiting = sequence.pieces.logprobs
            count = 0
            for t in waiting:
                left -= 1 + len(t.top)
                if left < 0:
                    break
                count += 1
            if count:
                is_first = not self._call.is_resumed and sequence.index not in self._begun
                pieces.append(Piece(sequence.index, "", "", waiting[:count], is_first))
            if left < 0:
                break
        else:
            return []  # all fit into one chunk
        for piece in pieces:
            del self._call.sequences[piece.index].pieces.logprobs[: len(piece.logprobs)]
        return pieces
