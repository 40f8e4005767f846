"""The chats that one worker turns into prompts for this gateway. A chat is outstanding from the time when it is sent
until the worker's answer arrives."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.rendering import MAX_OUTSTANDING, JoinedPieces

MAX_MESSAGE = 500


class RendererLost(Exception):
    """Raised when a worker's link has ended before the worker returned the rendered chat."""


@dataclass(slots=True, eq=False)
class RenderedPrompt:
    """A prompt that a worker has rendered. `tokens`: its length in tokens. `max_tokens`: the largest length that the
    gateway accepts. `ids` is empty for a longer prompt."""

    ids: array[int]
    tokens: int
    max_tokens: int


@dataclass(slots=True, eq=False)
class _Outstanding:
    answer: asyncio.Future[RenderedPrompt]
    pieces: JoinedPieces
    max_tokens: int


class LinkRenders:
    """The outstanding chats of one link: sent to the worker, but not yet rendered. An answer with an unknown render
    number is ignored."""

    def __init__(self, send: Callable[[pb.Render], None]) -> None:
        """`send` sends a message to the worker."""
        self._send = send
        self._numbers = itertools.count(1)
        self._outstanding: dict[int, _Outstanding] = {}

    def __len__(self) -> int:
        return len(self._outstanding)

    @property
    def has_room(self) -> bool:
        """Whether another chat can be sent to the worker now: fewer than MAX_OUTSTANDING chats are outstanding."""
        return len(self._outstanding) < MAX_OUTSTANDING

    def start(self, chat: bytes, max_tokens: int, timeout_s: float) -> asyncio.Future[RenderedPrompt]:
        """Send a chat to the worker. Returns a future that gets the rendered prompt, or raises CallError or
        RendererLost.

        The chat stays outstanding until its answer arrives, even if the future is cancelled."""
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._outstanding[number] = _Outstanding(answer, JoinedPieces(max_tokens), max_tokens)
        timeout_ms = max(int(timeout_s * 1000), 1)
        self._send(pb.Render(number=number, chat=chat, max_tokens=max_tokens, timeout_ms=timeout_ms))
        return answer

    def apply(self, piece: pb.Rendered) -> bool:
        """Apply a piece of an answer. Returns True if the answer is now complete, so that the worker has room for
        another chat.

        Raises ValueError for an answer that does not fit its request."""
        outstanding = self._outstanding.get(piece.number)
        if outstanding is None:
            return False
        outstanding.pieces.add(piece)
        if piece.more:
            return False
        if not outstanding.answer.done():
            _set_answer(outstanding, piece)
        del self._outstanding[piece.number]  # last: a ValueError above ends the link, and `lose` must find the render
        return True

    def lose(self) -> None:
        """Fail all outstanding chats with RendererLost, because the link has ended."""
        outstanding, self._outstanding = list(self._outstanding.values()), {}
        for render in outstanding:
            if not render.answer.done():
                render.answer.set_exception(RendererLost())


def _set_answer(outstanding: _Outstanding, piece: pb.Rendered) -> None:
    if piece.reason:
        outstanding.answer.set_exception(_error(piece))
        return
    ids = array("I")
    ids.frombytes(outstanding.pieces.ids)
    if not piece.tokens or len(ids) != (piece.tokens if piece.tokens <= outstanding.max_tokens else 0):
        raise ValueError(f"a prompt of {piece.tokens} tokens with {len(ids)} ids")
    outstanding.answer.set_result(RenderedPrompt(ids, piece.tokens, outstanding.max_tokens))


def _error(piece: pb.Rendered) -> CallError:
    outcome = Outcome.__members__.get(piece.reason, Outcome.INTERNAL)
    message = piece.message[:MAX_MESSAGE]
    if outcome is Outcome.INVALID_FIELD and piece.field:
        return CallError(outcome, f"{piece.field}: {message}", violations=[Violation(piece.field, message)])
    return CallError(outcome, message)
