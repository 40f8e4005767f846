"""Which call a lost worker may be blamed on: one that loses two in a row, with no token between, gets no third.

Problem: a request that crashes or blocks whatever engine it reaches would be passed from worker to worker, and with
each of them all other streams there break. Only that a worker is lost can be seen, not why.
Invariant: a sequence that lost `most` workers unexpectedly, with no new token since before the first of them, is
sent to no other, unless the losses are general: more workers that it was not on were lost about then. That is decided
SETTLE_S after its last loss, since workers of one host or network are found lost one after the other.
Not lost unexpectedly is a worker that had said that it leaves, and one that was out of reach and whose process has
dialled again by then. `now` is an argument.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Collection

MOST_SILENT = 2
"""The default of gateway.resume.max_silent_losses."""
CARRIED = "at another gateway"
"""Stands among a sequence's lost links for a resumption after which no token came."""
SETTLE_S = 1.0
WINDOW_S = 30.0
"""Losses this old say nothing about those of now."""


class LossVerdict(enum.Enum):
    """What becomes of a sequence that has lost as many workers in a row as it may."""

    WAIT = "wait"
    RESUME = "resume"
    END = "end"


class WorkerLosses:
    """Workers that one gateway has lost unexpectedly of late."""

    def __init__(self, most: int = MOST_SILENT) -> None:
        self._most = most
        self._lost: deque[tuple[float, str, str]] = deque()

    def lost(self, link: str, now: float, out_of_reach: str = "") -> None:
        """A link has ended, named as the sequences on it name it. `out_of_reach`: the incarnation of a worker of which
        no more is known than that."""
        self._lost.append((now, link, out_of_reach))
        self._forget(now)

    def returned(self, incarnation: str) -> None:
        """A worker has a link again: if it was only out of reach, it was not lost."""
        if any(name == incarnation for *_, name in self._lost):
            self._lost = deque(one for one in self._lost if one[2] != incarnation)

    def verdict(self, own: Collection[str], since: float, now: float) -> LossVerdict:
        """For a sequence that was on the links `own` when they ended, the last of them at `since`."""
        if now - since < SETTLE_S:
            return LossVerdict.WAIT
        self._forget(now)
        mine = sum(link in own for _, link, _ in self._lost)
        others = len(self._lost) - mine
        mine += sum(link == CARRIED for link in own)
        return LossVerdict.END if mine >= self._most and others <= mine else LossVerdict.RESUME

    def _forget(self, now: float) -> None:
        while self._lost and now - self._lost[0][0] > WINDOW_S:
            self._lost.popleft()

    def __repr__(self) -> str:
        return f"Losses({len(self._lost)} within {WINDOW_S:g} s)"
