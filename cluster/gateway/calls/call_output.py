"""The output of a call as the call's API reads it: the pieces of all sequences, the error, and the notification of
updates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.sequences.sequence import OutputSequence


class CallOutput:
    """The output of one call. The links to the workers write the output through the call's sequences, and one API reads
    it."""

    __slots__ = ("_is_silent", "_listener", "_news", "_sequences", "_silent_since", "_usage", "_waiter", "error")

    def __init__(self, sequences: Sequence[OutputSequence[Any]], usage: CallUsage, arrived: float) -> None:
        """`sequences`: the call's list of sequences, which may still be empty. `usage`: the usage of the call, in which
        the tokens are counted. `arrived`: time of the call's arrival."""
        self._sequences = sequences
        self._usage = usage
        self.error: CallError | None = None
        """The error with which the call has ended; None if the call goes on or has ended well."""
        self._silent_since = arrived
        """Time of the last keep-alive; before the first keep-alive, the time of the call's arrival."""
        self._is_silent = False
        """Whether a keep-alive is due on the caller's connection."""
        self._listener: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._news = False

    # ---- from the call

    def fail(self, error: CallError) -> None:
        """Set the error with which the call ends. Only the first error counts."""
        if self.error is None:
            self.error = error

    def wake(self) -> None:
        """Notify the API of an update."""
        self._news = True
        if self._listener is not None:
            self._listener()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # ---- keep-alives

    def silent_s(self, now: float) -> float:
        """Return the seconds since the latest of these events: the call's arrival, its last token, its last
        keep-alive."""
        since = self._silent_since
        for sequence in self._sequences:
            if sequence.last_token_at > since:
                since = sequence.last_token_at
        return now - since

    def fall_silent(self, now: float) -> None:
        """Record that the call has had no output for a while, so that the API sends a keep-alive."""
        self._silent_since, self._is_silent = now, True
        self.wake()

    def pop_keepalive(self) -> bool:
        """Return whether the API must send a keep-alive now. Further calls return False until the next keep-alive is
        due."""
        due, self._is_silent = self._is_silent, False
        return due

    # ---- to the API

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Set the function that is called at every update, for an API that batches the updates of many calls. If it is
        None, each update instead wakes the task that waits in `news`."""
        self._listener = listener

    async def news(self) -> None:
        """Wait for an update."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False

    def pop_pieces(self) -> list[Piece]:
        """Return the new pieces of all sequences. Once all text before the call's error has been returned, raises that
        error."""
        sequences = self._sequences
        try:
            pieces = [piece for sequence in sequences if (piece := sequence.pieces.pop()) is not None]
            for piece in pieces:
                if piece.finish_reason and piece.finish_reason != sequences[piece.index].finish_reason:
                    # a guard has refused text that was held back to the end
                    sequences[piece.index].finish(piece.finish_reason)
        except Exception:
            if self.error is not None:  # reading the text may be what failed
                raise self.error from None
            raise
        self._usage.count_tokens(sequences)  # not earlier: a guard that refuses at the very end removes tokens
        if self.error is not None and not any(piece.text or piece.parts for piece in pieces):
            raise self.error
        return pieces

    async def all_pieces(self) -> list[Piece]:
        """Wait for the end of the call and return all pieces. If the call has failed, raises the call's error, even if
        there was text before the error."""
        while not self.finished and self.error is None:
            await self.news()
        pieces = self.pop_pieces()
        if self.error is not None:
            raise self.error
        return pieces

    def pop_text(self) -> str | None:
        """Return the new text of a call with one sequence, as a fast path of `pop_pieces`. Returns "" if there is no
        text that may be sent yet. Returns None if there is more to deliver than text; then `pop_pieces` must be
        called."""
        sequences = self._sequences
        if len(sequences) != 1 or self.error is not None or self._is_silent:
            return None
        return sequences[0].pieces.pop_text()

    @property
    def unread_logprobs(self) -> int:
        """Approximate number of log probabilities that the API has not fetched yet, alternatives included."""
        buffers = [sequence.pieces.logprobs for sequence in self._sequences]
        return sum(len(buffer) * (1 + len(buffer[0].top)) for buffer in buffers if buffer)

    @property
    def finished(self) -> bool:
        """Whether every sequence has finished without an error."""
        return all(sequence.finish_reason for sequence in self._sequences)

    @property
    def end_delivered(self) -> bool:
        """Whether the last piece of every sequence has been returned. Nothing follows after that."""
        return all(sequence.pieces.end_popped for sequence in self._sequences)
