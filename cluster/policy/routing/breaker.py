"""Circuit breakers: a worker whose calls fail gets no more calls until a half-open probe succeeds.

Problem: a worker may fail every call although its link is up. Each call that is sent to such a worker loses an attempt.
The engine of the worker may also recover, and then no operator should have to intervene.

Invariants: a breaker opens after the failures of FAILURES calls without an answer in between, or at once when its
worker is found stalled. An open breaker rejects calls until a pause is over, then lets one call at a time through as a
probe. The first probe that is answered closes the breaker. A probe that fails opens the breaker for twice as long.

A call may itself be the cause of its failures, for example by a text whose vector is NaN in every engine. Such calls
must not take the workers away from other tenants. So a call counts once per worker, and no longer at all once a second
worker has failed it too. If a third worker then answers it, the failures count again. An engine that is really broken
is also found by its golden check (worker/engine/golden_check.py).

Consecutive failures never open the last closed breaker: if there is no other worker, a bad worker is better than none.
A stall opens even the last closed breaker, because a stalled worker answers no calls. A worker that was only
unreachable needs no probe: after the reconnect, its engine's steps for other gateways show that the engine works.

Source: the circuit breaker of Nygard, "Release It!" (2nd ed., 2018), chapter 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

FAILURES = 3
PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
TRIAL_S = 5.0
"""Time in seconds after which an unanswered probe no longer counts, because its caller may be gone."""
KEPT_S = 60.0
"""Time in seconds for which the open breaker of a worker without a link is kept after its pause."""
SHOWN_STEPS = 10
"""Number of engine steps after a reconnect that show that the engine is not stalled."""
MAX_CALLS = 16
"""Number of failed calls that are remembered per worker."""
MAX_SUSPECTS = 1_000
"""Number of suspect calls that are remembered. The oldest is forgotten first."""


@dataclass(slots=True)
class _Breaker:
    failed: set[str] = field(default_factory=set)
    """The failed calls that count, at most MAX_CALLS."""
    stalled: bool = False
    """Whether the breaker opened because the worker was found stalled."""
    pause_s: float = 0.0
    opened_at: float = 0.0
    trial_at: float | None = None
    unseen: bool = False
    """Whether the breaker opened because the engine could not be observed."""
    steps: int = 0
    """Step count of the engine in the first report after the reconnect."""
    seen: bool = False
    """Whether the engine has been observed working since the breaker opened. True closes the breaker, but `pause_s`
    stays until a success: if the breaker opens again before that, the pause doubles."""

    @property
    def closed(self) -> bool:
        return self.seen or not self.pause_s


class Breakers:
    """Circuit breakers, one for each incarnation of a worker. A worker without recent failures takes no memory."""

    def __init__(self) -> None:
        self._breakers: dict[str, _Breaker] = {}
        self._suspects: dict[str, None] = {}
        """Calls that two workers have failed, in the order in which they became suspect."""

    def allows(self, incarnation: str, now: float) -> bool:
        """Whether a call may be sent to the worker."""
        breaker = self._breakers.get(incarnation)
        if breaker is None or breaker.closed:
            return True
        if now - breaker.opened_at < breaker.pause_s:
            return False
        return breaker.trial_at is None or now - breaker.trial_at >= TRIAL_S

    def rejecting(self, now: float) -> Collection[str]:
        """Return the incarnations to which no call may be sent now. Usually there are none."""
        if not self._breakers:
            return ()
        return [incarnation for incarnation in self._breakers if not self.allows(incarnation, now)]

    def record_sent(self, incarnation: str, now: float) -> None:
        """Record a call that was sent to the worker. If the breaker is not closed, the call is the probe."""
        breaker = self._breakers.get(incarnation)
        if breaker is not None and not breaker.closed:
            breaker.trial_at = now

    def record_success(self, incarnation: str) -> None:
        """Close the breaker, because the worker has returned a token for a call."""
        self._breakers.pop(incarnation, None)

    def record_failure(
        self, incarnation: str, call: str, earlier: Collection[str], others: Iterable[str], now: float
    ) -> None:
        """Record that a worker has failed a call.

        `earlier`: incarnations of the workers that have failed the same request of the call before. If there are any,
        the call becomes suspect, and its failures no longer count. `others`: incarnations of the workers that could
        serve in place of this worker.
        """
        if earlier:
            self._suspect(call)
            for other in earlier:
                self._withdraw(other, call)
        if call in self._suspects:
            if (breaker := self._breakers.get(incarnation)) is not None:
                breaker.trial_at = None  # this probe has shown nothing
            return
        self._count_failure(incarnation, call, others, now)

    def record_proof(self, failed: Collection[str], call: str, workers: Collection[str], now: float) -> None:
        """Record that a worker has answered a request that the workers `failed` could not continue, so that these
        workers are at fault. `workers`: incarnations of all workers that could serve the call."""
        if call in self._suspects:
            del self._suspects[call]
            for incarnation in failed:
                self._count_failure(incarnation, call, (each for each in workers if each != incarnation), now)

    def _count_failure(self, incarnation: str, call: str, others: Iterable[str], now: float) -> None:
        breaker = self._breakers.setdefault(incarnation, _Breaker())
        if len(breaker.failed) < MAX_CALLS:
            breaker.failed.add(call)
        breaker.unseen = False
        if not breaker.closed or (len(breaker.failed) >= FAILURES and any(self._is_closed(other) for other in others)):
            self._open(breaker, now)

    def _suspect(self, call: str) -> None:
        self._suspects[call] = None
        if len(self._suspects) > MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]

    def _withdraw(self, incarnation: str, call: str) -> None:
        """No longer count a call among the failures of a worker. A breaker that opened only by too many failures
        closes if too few are left."""
        breaker = self._breakers.get(incarnation)
        if breaker is None or call not in breaker.failed:
            return
        breaker.failed.remove(call)
        if len(breaker.failed) < FAILURES and not breaker.stalled:
            breaker.pause_s = 0.0
            if not breaker.failed:
                del self._breakers[incarnation]

    def record_stall(self, incarnation: str, now: float, unseen: bool = False) -> None:
        """Open the breaker of a stalled worker.

        `unseen`: the worker counts as stalled because its engine could not be observed.
        """
        breaker = self._breakers.setdefault(incarnation, _Breaker())
        self._open(breaker, now)
        breaker.stalled, breaker.unseen = True, unseen

    def record_steps(self, incarnation: str, now: float, steps: int) -> None:
        """Record that a worker's engine has done `steps` steps, as reported on the worker's new link after a reconnect;
        0 before the first report.

        A breaker that opened because the engine could not be observed may close after its pause, once the engine has
        done SHOWN_STEPS steps since the first report.
        """
        breaker = self._breakers.get(incarnation)
        if breaker is None or not breaker.unseen:
            return
        breaker.steps = breaker.steps or steps
        if now - breaker.opened_at >= breaker.pause_s and steps - breaker.steps >= SHOWN_STEPS:
            breaker.seen = True

    def retain(self, incarnations: Iterable[str], now: float) -> None:
        """Forget the breakers of all incarnations that are not in `incarnations`. An open breaker is kept for KEPT_S
        after its pause, since its worker may connect again."""
        kept = set(incarnations)
        self._breakers = {
            name: breaker
            for name, breaker in self._breakers.items()
            if name in kept or (not breaker.closed and now - breaker.opened_at < breaker.pause_s + KEPT_S)
        }

    @property
    def open(self) -> int:
        """Number of breakers that are not closed."""
        return sum(not breaker.closed for breaker in self._breakers.values())

    def _is_closed(self, incarnation: str) -> bool:
        breaker = self._breakers.get(incarnation)
        return breaker is None or breaker.closed

    def _open(self, breaker: _Breaker, now: float) -> None:
        breaker.pause_s = min(2 * breaker.pause_s, LONGEST_PAUSE_S) if breaker.pause_s else PAUSE_S
        breaker.opened_at, breaker.trial_at = now, None
        breaker.seen, breaker.steps = False, 0

    def __repr__(self) -> str:
        return f"Breakers({self.open} open of {len(self._breakers)})"
