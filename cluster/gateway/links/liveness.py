"""Whether a worker lives, as far as its link tells: beats, steps, acknowledgements and its own count of messages.

Problem: a process that is stopped, an engine that is stuck and a connection cut one way all leave the link up. The
caller must not wait for TCP to notice; nor may a long prefill, a grammar or a busy machine be taken for death.
Invariant: a worker that beats, whose engine steps or says what it is busy with, and that applies and is heard, is never
suspected. A wrong suspicion costs its calls one prefill elsewhere (epochs keep what it still says from being applied).

Time is the gateway's *waking* time (`Waking`): seconds in which the gateway itself did not run when it was due do not
count, else its own hiccup, or a machine too busy for both, would look like the death of all its workers. No clock is
read here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.api.types import EngineLoad

STEPS = 5
"""So many of its longest steps (p99) may pass before an engine that stands still is taken for stuck."""
LATE_S = 0.01
"""By so much anybody may oversleep: it is no sign of a busy machine, and not worth finding the dead later."""


_WHY = {
    "silent": "no beat for {:.1f} s",
    "hung": "its engine has not stepped for {:.1f} s",
    "deaf": "it beats but acknowledges nothing",
    "mute": "it beats but what it sends does not arrive",
}


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Why a worker is taken for lost: `reason` is one word, a metric's label; `why` is for people."""

    reason: str
    why: str


class Waking:
    """A clock that stands still while its owner should have run and did not.

    Whoever looks after the workers says for how long it goes to rest; what it oversleeps by more than LATE_S does not
    count. Where every process waits for a core, beats come as late as the looks for them.
    """

    def __init__(self, now: float, rest_s: float) -> None:
        self._waked = 0.0
        self._since = now
        self._counts_s = rest_s + LATE_S

    def at(self, now: float) -> float:
        """The waking time when it is `now`."""
        return self._waked + min(max(now - self._since, 0.0), self._counts_s)

    def rest(self, now: float, rest_s: float) -> None:
        """It is `now`, and its owner goes to rest for so long."""
        self._waked, self._since, self._counts_s = self.at(now), now, rest_s + LATE_S


class LinkLiveness:
    """Of one epoch of one worker. `now` is always waking time."""

    def __init__(self, now: float, hang_s: float, silence_s: float) -> None:
        """`hang_s`: the least time after which a worker that stands still is suspected; `silence_s` for one that has
        not beaten at all yet, whose beats have a connection to open first."""
        self._hang_s = hang_s
        self._silence_s = silence_s
        self._heard = now
        self._beats = False
        self._steps = -1
        self._stepped = now
        self._stuck_with = EngineLoad()
        self._slowest_s = 0.0
        self._unacked: deque[tuple[int, float]] = deque()
        self._received = 0
        self._sent = 0
        self._missing_since: float | None = None

    @property
    def bound_s(self) -> float:
        """How long it may stand still."""
        return max(STEPS * self._slowest_s, self._hang_s)

    @property
    def silent_since(self) -> float:
        """When it was last heard."""
        return self._heard

    def told(self, load: EngineLoad, now: float) -> None:
        """Its load has come, by whatever way."""
        self._slowest_s = max(load.step_p99_s, load.step_s)
        if load.steps != self._steps or not load.running or load.busy:
            self._steps, self._stepped = load.steps, now
        self._stuck_with = load

    def beat(self, load: EngineLoad, acked_seq: int, sent_seq: int, now: float) -> None:
        """A beat has come."""
        self._heard, self._beats = now, True
        self.told(load, now)
        self._acked(acked_seq)
        self._sent = max(self._sent, sent_seq)
        self._compare(now)

    def received(self, seq: int, acked_seq: int, now: float) -> None:
        """A message of its stream has come."""
        self._heard = now
        if seq > self._received:
            self._received, self._missing_since = seq, None
        self._acked(acked_seq)
        self._compare(now)

    def commanded(self, seq: int, now: float) -> None:
        """A message goes out to it."""
        self._unacked.append((seq, now))

    def suspicion(self, now: float) -> Suspicion | None:
        """Whether it is to be taken for lost."""
        for reason, since, bound_s in self._standing():
            if now > since + bound_s:
                return Suspicion(reason, _WHY[reason].format(now - since))
        return None

    @property
    def due(self) -> float:
        """When it will be suspected if nothing more is heard of it."""
        return min(since + bound_s for _, since, bound_s in self._standing())

    def _standing(self) -> Iterator[tuple[str, float, float]]:
        """What it owes: (reason, since when, how long it may)."""
        bound_s = self.bound_s
        yield "silent", self._heard, bound_s if self._beats else self._silence_s
        if self._stuck_with.running:
            yield "hung", self._stepped, bound_s
        if self._unacked:
            yield "deaf", self._unacked[0][1], 2 * bound_s
        if self._missing_since is not None:
            yield "mute", self._missing_since, 2 * bound_s

    def _acked(self, seq: int) -> None:
        while self._unacked and self._unacked[0][0] <= seq:
            self._unacked.popleft()

    def _compare(self, now: float) -> None:
        if self._received >= self._sent:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now

    def __repr__(self) -> str:
        return f"Liveness(bound {self.bound_s:.2f} s, {len(self._unacked)} unacknowledged)"
