"""Canary verdict: sequential tests of the error rate and the time to first token (TTFT) of a canary.

Problem: a canary is checked every second for hours, on few calls. A test with a 5 % false-positive rate
would give a wrong verdict every twenty seconds.

Invariant: if a canary is no worse than the configured ratio allows, the probability of a rollback because
of errors is at most ALPHA, and so is the probability of a rollback because of TTFT. The bound does not
depend on the number of checks.

Method: both tests bet against the hypothesis "no worse than allowed" (an e-process; Ville's inequality
gives the bound). The bet is spread over a grid of possible degradations.

Errors: let n be the number of calls of the canary, m the number of calls of the stable version, and r the
ratio. Given a failed call, the probability that the canary served the call is at most r*n / (r*n + m).

TTFT: gateways pair each call of the canary with the most recent call of the stable version. The canary
loses a pair if its TTFT was more than r times as long as that of the stable version. A canary that is no
worse than allowed loses at most half of the pairs. The calls of a pair are close in time, so changes in
load affect both calls.

Source: Ramdas, Gruenwald, Vovk, Shafer, "Game-theoretic statistics and safe anytime-valid inference"
(2023), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.01
GRID = tuple(0.02 * 1.35**step for step in range(18))
"""Possible degradations, each as an increment of the log odds of a loss. The odds grow by 2 % at the lower end of the
grid and more than threefold at the upper end."""
MIN_ERRORS = 3
"""Minimum number of failed calls of a canary before its errors are judged."""


@dataclass(frozen=True, slots=True)
class CanaryTally:
    """Counts of one version, as reported by the gateways.

    `pairs`: number of pairs of calls, one of each version, whose TTFT was compared. `slower`: number of pairs in which
    the TTFT of this version was more than `ttft_ratio` times that of the other version.
    """

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
    """Verdict on a canary: whether to roll back, and the deciding numbers as text for humans."""

    roll_back: bool = False
    why: str = ""


def log_evidence(losses: int, wins: int, chance: float) -> float:
    """Return the natural logarithm of the evidence against the hypothesis "each trial is lost with a probability of at
    most `chance`".

    The evidence is the wealth of a bettor who starts with 1 and bets against the hypothesis. `losses` and `wins` are
    the results of the trials. `chance` is in (0, 1). If the hypothesis is true, the probability that the evidence ever
    exceeds 1/a is at most a.
    """
    terms = []
    for degradation in GRID:
        odds = chance / (1.0 - chance) * math.exp(degradation)
        bet = odds / (1.0 + odds)
        terms.append(losses * math.log(bet / chance) + wins * math.log((1.0 - bet) / (1.0 - chance)))
    largest = max(terms)
    return largest + math.log(sum(math.exp(term - largest) for term in terms) / len(terms))


def judge(stable: CanaryTally, canary: CanaryTally, *, error_ratio: float, ttft_ratio: float) -> CanaryVerdict:
    """Return whether the canary must be rolled back, and why. There are two possible reasons: its calls fail more than
    `error_ratio` times as often as those of the stable version, or its times to first token are more than `ttft_ratio`
    times as long. If a ratio is 0, its reason is not checked."""
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
