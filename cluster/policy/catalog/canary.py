"""Whether a version on trial has to go: sequential tests of its errors and of its time to the first token. Pure.

Problem: a trial is looked at every second for hours, on few calls. A comparison that is right once in twenty is wrong
every twenty seconds.
Invariant: if the trial is in truth no worse than the set ratio allows, then the chance that it is ever taken back,
however often one looks and for however long, is at most ALPHA for its errors and ALPHA for its first tokens.
Both tests bet against "no worse than allowed" (an e-process; Ville's inequality gives the bound). Errors: given that a
call has failed, it is the trial's with a chance of at most r*n / (r*n + m), for n calls of the trial, m of the other
and the ratio r. First tokens: gateways pair each call of the trial with the last one of the other, and the trial loses
a pair where its first token took more than r times as long; it loses no more than half of them if it is no worse. Pairs
are of one moment, so the load's rise and fall is in both. The bet is spread over a grid of how much worse it might be.
Source: Ramdas, Gruenwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid inference" (2023), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.01
GRID = tuple(0.02 * 1.35**step for step in range(18))
"""How much worse, as what is added to the log odds of a loss: 2 % to threefold odds and beyond."""
MIN_ERRORS = 3
"""A version that has failed fewer calls than this is not judged by its errors, however few the other failed."""


@dataclass(frozen=True, slots=True)
class CanaryTally:
    """What gateways have counted of a version. `pairs` of first tokens, of which it was the slower in `slower`."""

    calls: int = 0
    errors: int = 0
    pairs: int = 0
    slower: int = 0

    def __add__(self, other: CanaryTally) -> CanaryTally:
        return CanaryTally(
            self.calls + other.calls,
            self.errors + other.errors,
            self.pairs + other.pairs,
            self.slower + other.slower,
        )


@dataclass(frozen=True, slots=True)
class CanaryVerdict:
    """`goes` with `why` for humans: the numbers that it was decided by."""

    goes: bool = False
    why: str = ""


def log_evidence(losses: int, wins: int, chance: float) -> float:
    """The natural logarithm of the bet's worth against "each loss comes with at most this chance", in (0, 1).

    It begins at 0; that it ever exceeds log(1/a) has a chance of at most a while what it bets against is true.
    """
    terms = []
    for worse in GRID:
        odds = chance / (1.0 - chance) * math.exp(worse)
        bet = odds / (1.0 + odds)
        terms.append(losses * math.log(bet / chance) + wins * math.log((1.0 - bet) / (1.0 - chance)))
    most = max(terms)
    return most + math.log(sum(math.exp(term - most) for term in terms) / len(terms))


def judge(stays: CanaryTally, trial: CanaryTally, *, error_ratio: float, ttft_ratio: float) -> CanaryVerdict:
    """Whether the version on trial goes. A ratio of 0 is not looked at."""
    enough = -math.log(ALPHA)
    if error_ratio and trial.errors >= MIN_ERRORS and trial.calls and stays.calls:
        allowed = error_ratio * trial.calls
        chance = allowed / (allowed + stays.calls)
        if log_evidence(trial.errors, stays.errors, chance) > enough:
            return CanaryVerdict(
                True,
                f"{trial.errors} of its {trial.calls} calls failed, {stays.errors} of {stays.calls} of the other: "
                f"more than {error_ratio:g} times as often",
            )
    if ttft_ratio and trial.pairs and log_evidence(trial.slower, trial.pairs - trial.slower, 0.5) > enough:
        return CanaryVerdict(
            True,
            f"in {trial.slower} of {trial.pairs} pairs of calls its first token took more than {ttft_ratio:g} times as "
            "long as the other's",
        )
    return CanaryVerdict()
