"""Canary verdict: sequential tests of a canary's error rate and of its time to first token (TTFT). Pure.

Problem: a canary is checked every second for hours, on few calls. A test with a 5 % false-positive rate would be wrong
every twenty seconds.

Invariant: if the canary is no worse than the configured ratio allows, the probability that it is ever rolled back is at
most ALPHA for its errors and ALPHA for its TTFT, however often and for however long it is checked.

Method: both tests bet against the hypothesis "no worse than allowed" (an e-process; Ville's inequality gives the
bound). Errors: given a failed call, the probability that the canary served it is at most r*n / (r*n + m), where n is
the number of the canary's calls, m that of the stable version, and r the ratio. TTFT: gateways pair each call of the
canary with the most recent call of the stable version. The canary loses a pair if its TTFT was more than r times as
long; if it is no worse, it loses at most half of the pairs. The calls of a pair are close in time, so changes in load
affect both. The bet is spread over a grid of possible degradations.

Source: Ramdas, Gruenwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid inference" (2023), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.01
GRID = tuple(0.02 * 1.35**step for step in range(18))
"""Possible degradations, as an increment of the log odds of a loss: from 2 % to more than threefold odds."""
MIN_ERRORS = 3
"""A version with fewer failed calls than this is not judged by its errors, however few the other version has."""


@dataclass(frozen=True, slots=True)
class CanaryTally:
    """Gateways' counts for one version. Of its `pairs` of TTFT values, it was slower in `slower`."""

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
    """Whether the canary `goes`, and `why`: the deciding numbers, for humans."""

    roll_back: bool = False
    why: str = ""


def log_evidence(losses: int, wins: int, chance: float) -> float:
    """Natural logarithm of the bet's wealth against "each loss has at most this probability". `chance` is in (0, 1).

    The value starts at 0. While the hypothesis is true, it ever exceeds log(1/a) with a probability of at most a.
    """
    terms = []
    for degradation in GRID:
        odds = chance / (1.0 - chance) * math.exp(degradation)
        bet = odds / (1.0 + odds)
        terms.append(losses * math.log(bet / chance) + wins * math.log((1.0 - bet) / (1.0 - chance)))
    largest = max(terms)
    return largest + math.log(sum(math.exp(term - largest) for term in terms) / len(terms))


def judge(stable: CanaryTally, canary: CanaryTally, *, error_ratio: float, ttft_ratio: float) -> CanaryVerdict:
    """Decide whether the canary must be rolled back. A ratio of 0 disables its test."""
    threshold = -math.log(ALPHA)
    if error_ratio and canary.errors >= MIN_ERRORS and canary.calls and stable.calls:
        allowed = error_ratio * canary.calls
        chance = allowed / (allowed + stable.calls)
        if log_evidence(canary.errors, stable.errors, chance) > threshold:
            return CanaryVerdict(
                True,
                f"{canary.errors} of its {canary.calls} calls failed, {stable.errors} of {stable.calls} of the other: "
                f"more than {error_ratio:g} times as often",
            )
    if ttft_ratio and canary.pairs and log_evidence(canary.slower, canary.pairs - canary.slower, 0.5) > threshold:
        return CanaryVerdict(
            True,
            f"in {canary.slower} of {canary.pairs} pairs of calls its first token took more than {ttft_ratio:g} times "
            "as long as the other's",
        )
    return CanaryVerdict()
