"""Failure detection for one worker, from what arrives on the worker's link: heartbeats, engine steps, acknowledgements
and message counts.

Problem: the link stays up when the worker's process is stopped, its engine is stuck or the connection is cut in one
direction. Callers must not wait until TCP detects such a failure. Yet a long prefill, a grammar compilation or a busy
machine must not count as a failure. Invariant: a worker is never suspected while these three conditions hold: the
worker sends heartbeats, its engine steps or reports why it is busy, and messages are acknowledged in both directions.
After a wrong suspicion, the worker's calls must be prefilled again on other workers. Later messages of the suspected
worker are not applied, because they have the number (epoch) of an ended connection.

Time is the gateway's *waking* time (`Waking`), which excludes the seconds in which the gateway was due to run and did
not run. Otherwise a pause of the gateway, or a machine that is too busy for gateway and workers, would look like the
failure of all workers. This module reads no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.api.types import EngineLoad

STEPS = 5
"""Time without a step after which an engine counts as stuck, as a multiple of the engine's step time. This step time is
the 99th percentile of the step times or the time of the last step, whichever is longer."""
LATE_S = 0.01
"""Seconds of oversleeping that count as waking time. Such short oversleeping is no sign of a busy machine, and
excluding it would delay detection."""


_WHY = {
    "silent": "no beat for {:.1f} s",
    "hung": "its engine has not stepped for {:.1f} s",
    "deaf": "it beats but acknowledges nothing",
    "mute": "it beats but what it sends does not arrive",
}


@dataclass(frozen=True, slots=True)
class Suspicion:
    """The reason why a worker is considered lost. `reason`: one word, used as a metric label. `why`: a text for
    people."""

    reason: str
    why: str


class Waking:
    """A clock that does not count the time by which its owner woke up too late.

    The owner announces each sleep. If a sleep lasts more than LATE_S longer than announced, the excess is not
    counted. On an overloaded machine both the workers' heartbeats and the owner's checks come late, and such a
    delay must not count as silence of a worker.
    """

    def __init__(self, now: float, rest_s: float) -> None:
        self._waked = 0.0
        self._since = now
        self._counts_s = rest_s + LATE_S

    def at(self, now: float) -> float:
        """Return this clock's reading at the monotonic time `now`. The time by which the owner of the clock woke up too
        late does not count."""
        return self._waked + min(max(now - self._since, 0.0), self._counts_s)

    def rest(self, now: float, rest_s: float) -> None:
        """Record that the task that uses this clock goes to sleep at `now` for `rest_s` seconds."""
        self._waked, self._since, self._counts_s = self.at(now), now, rest_s + LATE_S


class LinkLiveness:
    """Failure detection for one connection (epoch) of one worker. Each parameter `now` is waking time: seconds that
    exclude the time in which the gateway itself did not run."""

    def __init__(self, now: float, hang_s: float, silence_s: float) -> None:
        """`hang_s`: minimum time, in seconds, before an inactive worker is suspected. `silence_s`: seconds for which a
        new worker may be silent before its first heartbeat. Heartbeats need a separate connection, which takes time to
        open."""
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
        """Seconds for which the worker may be inactive before it is suspected."""
        return max(STEPS * self._slowest_s, self._hang_s)

    @property
    def silent_since(self) -> float:
        """Time at which the last message or heartbeat arrived. It is in seconds of a clock that stands still while the
        gateway does not run."""
        return self._heard

    def record_load(self, load: EngineLoad, now: float) -> None:
        """Record a load report that arrived with a heartbeat or with another message."""
        self._slowest_s = max(load.step_p99_s, load.step_s)
        if load.steps != self._steps or not load.running or load.busy:
            self._steps, self._stepped = load.steps, now
        self._stuck_with = load

    def record_beat(self, load: EngineLoad, acked_seq: int, sent_seq: int, now: float) -> None:
        """Record a heartbeat. `acked_seq`: number of the last message that the worker has received. `sent_seq`: number
        of the last message that the worker has sent."""
        self._heard, self._beats = now, True
        self.record_load(load, now)
        self._acked(acked_seq)
        self._sent = max(self._sent, sent_seq)
        self._compare(now)

    def record_received(self, seq: int, acked_seq: int, now: float) -> None:
        """Record the arrival of the worker's message with the number `seq`. `acked_seq`: number of the last message
        that the worker has received."""
        self._heard = now
        if seq > self._received:
            self._received, self._missing_since = seq, None
        self._acked(acked_seq)
        self._compare(now)

    def record_sent(self, seq: int, now: float) -> None:
        """Record that the message with the number `seq` was sent to the worker, which must acknowledge it."""
        self._unacked.append((seq, now))

    def suspicion(self, now: float) -> Suspicion | None:
        """Return the reason why the worker is considered lost at `now`; None if the worker is not considered lost."""
        for reason, since, bound_s in self._obligations():
            if now > since + bound_s:
                return Suspicion(reason, _WHY[reason].format(now - since))
        return None

    @property
    def due(self) -> float:
        """Time at which the worker will be suspected if nothing more arrives from it, in waking time: seconds in which
        the gateway itself did not run are not counted."""
        return min(since + bound_s for _, since, bound_s in self._obligations())

    def _obligations(self) -> Iterator[tuple[str, float, float]]:
        """Yield one tuple for each thing that the gateway now expects of the worker, such as a heartbeat.

        The tuple holds the reason to suspect the worker if the thing does not happen in time, the time since which
        it is expected, and the seconds allowed. Seconds in which the gateway itself did not run are not counted.
        """
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
        return f"LinkLiveness(bound {self.bound_s:.2f} s, {len(self._unacked)} unacknowledged)"
