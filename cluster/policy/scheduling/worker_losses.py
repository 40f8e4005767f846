"""Verdict on sequences that lost workers. A sequence that lost two workers in a row, without a token in between, is not
sent to a third worker, with the exceptions below.

Problem: a request that crashes or blocks every engine would be passed from worker to worker and break all other streams
on these workers. The gateway sees that a worker is lost, but not why.

Invariant: the call of a sequence ends if the sequence lost `most` workers unexpectedly, with no token in between. There
are two exceptions:

- Within WINDOW_S, the gateway lost more workers that did not run the sequence than workers that did. Then the sequence
  resumes. The verdict is given SETTLE_S after the sequence's last loss, since the losses of one host or network are
  detected one after the other.
- Several suspect sequences lost their last worker together. Only one of them may be the cause. Each of them is then
  sent once more, to a worker that runs no other suspect sequence. So the sequence that causes the losses takes down
  one more worker, and no other sequence fails with it.

A loss is expected, and does not count, in two cases: the worker was draining, or the worker was only unreachable and
the same process has reconnected before the verdict.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

MOST_SILENT = 2
"""Default of the setting gateway.resume.max_silent_losses."""
CARRIED = "at another gateway"
"""Entry in a sequence's list of lost links for a loss at another gateway, after which the sequence got no token."""
SETTLE_S = 1.0
WINDOW_S = 30.0
"""Age in seconds after which a loss is forgotten."""


class LossVerdict(enum.Enum):
    """Decision about a sequence that may have crashed its workers (a suspect). WAIT: wait for more loss reports.
    RESUME: resume it. ALONE: send it to a worker that runs no other suspect. END: end its call."""

    WAIT = "wait"
    RESUME = "resume"
    ALONE = "alone"
    END = "end"


class WorkerLosses:
    """The recent unexpected losses of workers at one gateway."""

    def __init__(self, most: int = MOST_SILENT) -> None:
        self._most = most
        self._lost: deque[tuple[float, str, str]] = deque()
        self._suspects: dict[str, tuple[float, set[str]]] = {}
        """The suspect sequences, for each link: time of the link's loss, and keys of the sequences that lost this link
        last."""

    def lost(self, link: str, now: float, unreachable: str = "") -> None:
        """Record an unexpected end of a link. `unreachable`: the worker's incarnation if its process may still live,
        else ""."""
        self._lost.append((now, link, unreachable))
        self._forget(now)

    def returned(self, incarnation: str) -> None:
        """Forget the loss of a worker whose process has reconnected, since the worker was only unreachable."""
        if any(name == incarnation for *_, name in self._lost):
            self._lost = deque(loss for loss in self._lost if loss[2] != incarnation)

    def suspect(self, key: str, own: Sequence[str], now: float) -> None:
        """Record that the sequence `key` may have caused the loss of its workers. `own`: the worker links that the
        sequence has lost, by name, the oldest loss first; CARRIED stands for a loss at another gateway."""
        if own[-1] != CARRIED:
            self._suspects.setdefault(own[-1], (now, set()))[1].add(key)
        self._forget(now)

    def verdict(self, own: Sequence[str], since: float, now: float) -> LossVerdict:
        """Return the verdict on a sequence that has lost workers. `own`: the losses of this sequence, the oldest first.
        Each loss is the name of the link that ended, or CARRIED if it happened at another gateway. `since`: time of the
        sequence's last loss."""
        if now - since < SETTLE_S:
            return LossVerdict.WAIT
        self._forget(now)
        own_losses = sum(link in own for _, link, _ in self._lost)
        other_losses = len(self._lost) - own_losses
        own_losses += sum(link == CARRIED for link in own)
        if own_losses < self._most or other_losses > own_losses:
            return LossVerdict.RESUME
        has_company = own[-1] in self._suspects and len(self._suspects[own[-1]][1]) > 1
        return LossVerdict.ALONE if has_company and len(own) == self._most else LossVerdict.END

    def _forget(self, now: float) -> None:
        while self._lost and now - self._lost[0][0] > WINDOW_S:
            self._lost.popleft()
        while self._suspects and now - next(iter(self._suspects.values()))[0] > WINDOW_S:
            del self._suspects[next(iter(self._suspects))]

    def __repr__(self) -> str:
        return f"WorkerLosses({len(self._lost)} within {WINDOW_S:g} s)"
