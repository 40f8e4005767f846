"""Circuit breakers: a worker that fails its calls gets no more of them until a trial has shown that it serves again.

Problem: a worker whose link is up may still fail whatever it is given; sending it call after call burns their attempts.
Its engine may also come to itself again, and then nobody should have to say so.
Invariants: a breaker opens after FAILURES failures in a row, or at once when its worker was found standing still; open,
it lets nothing through until a pause is over, then one call at a time; the first that is answered closes it, one that
fails opens it for twice as long. Failures in a row never open that of the last worker that answers: with nobody else a
bad worker is better than none. One that stands still answers nobody, so that rule does not hold for it; but whoever was
only out of sight is known by the steps that its engine makes before a new link's eyes, for others, and needs no trial.
Source: the circuit breaker of Nygard, "Release It!" (2nd ed., 2018), chapter 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FAILURES = 3
PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
TRIAL_S = 5.0
"""A trial without an answer for so long no longer counts: its caller may have gone."""
SHOWN_STEPS = 10
"""An engine that makes so many before the eyes of a new link does not stand still."""


@dataclass(slots=True)
class _Breaker:
    failures: int = 0
    pause_s: float = 0.0
    opened_at: float = 0.0
    trial_at: float | None = None
    unseen: bool = False
    """It is open since nothing of its engine was to be seen."""
    steps: int = 0
    """Of its engine, when it was first seen again."""
    seen: bool = False
    """Its engine has been seen at work since. What its next pause would be is not forgotten till a call is answered."""

    @property
    def closed(self) -> bool:
        return self.seen or not self.pause_s


class Breakers:
    """By worker incarnation. `now` is an argument; whoever has not failed of late takes no memory."""

    def __init__(self) -> None:
        self._breakers: dict[str, _Breaker] = {}

    def lets(self, incarnation: str, now: float) -> bool:
        """Whether a call may go there."""
        one = self._breakers.get(incarnation)
        if one is None or one.closed:
            return True
        if now - one.opened_at < one.pause_s:
            return False
        return one.trial_at is None or now - one.trial_at >= TRIAL_S

    def sent(self, incarnation: str, now: float) -> None:
        """A call goes there; where the breaker is not closed it is the trial."""
        one = self._breakers.get(incarnation)
        if one is not None and not one.closed:
            one.trial_at = now

    def answered(self, incarnation: str) -> None:
        """It has given a call a token."""
        self._breakers.pop(incarnation, None)

    def failed(self, incarnation: str, others: Iterable[str], now: float) -> None:
        """It has failed a call. `others` that could serve in its place."""
        one = self._breakers.setdefault(incarnation, _Breaker())
        one.failures += 1
        one.unseen = False
        if not one.closed or (one.failures >= FAILURES and any(self._is_closed(other) for other in others)):
            self._open(one, now)

    def stood_still(self, incarnation: str, now: float, unseen: bool = False) -> None:
        """It was found standing still; `unseen`: for nothing of its engine was to be seen."""
        one = self._breakers.setdefault(incarnation, _Breaker())
        self._open(one, now)
        one.unseen = unseen

    def stepped(self, incarnation: str, now: float, steps: int) -> None:
        """A link is up again, and tells so many steps of its engine, 0 as long as it has told nothing."""
        one = self._breakers.get(incarnation)
        if one is None or not one.unseen:
            return
        one.steps = one.steps or steps
        if now - one.opened_at >= one.pause_s and steps - one.steps >= SHOWN_STEPS:
            one.seen = True

    def forget(self, incarnations: Iterable[str]) -> None:
        """Keep only these."""
        kept = set(incarnations)
        self._breakers = {name: one for name, one in self._breakers.items() if name in kept or not one.closed}

    @property
    def open(self) -> int:
        """How many are not closed."""
        return sum(not one.closed for one in self._breakers.values())

    def _is_closed(self, incarnation: str) -> bool:
        one = self._breakers.get(incarnation)
        return one is None or one.closed

    def _open(self, one: _Breaker, now: float) -> None:
        one.pause_s = min(2 * one.pause_s, LONGEST_PAUSE_S) if one.pause_s else PAUSE_S
        one.opened_at, one.trial_at = now, None
        one.seen, one.steps = False, 0

    def __repr__(self) -> str:
        return f"Breakers({self.open} open of {len(self._breakers)})"
