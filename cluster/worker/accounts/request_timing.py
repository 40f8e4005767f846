"""Measurement of how long the stages of a request take in a worker. Only requests of sampled calls are measured."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.api.request_times import RequestTimes


@dataclass(slots=True)
class RequestTiming:
    """Times of the events of one request, in monotonic seconds; 0 for an event that has not happened yet."""

    received_at: float
    first_output_at: float = 0.0
    last_output_at: float = 0.0
    _first: RequestTimes | None = None

    def record_first(self, engine: RequestTimes | None, now: float) -> None:
        """Record the engine's first output.

        `engine`: durations that the engine has measured, or None. The rest of the time since the request was received
        counts as `wait_s`. Without measured durations, the whole time counts as `prefill_s`.
        """
        self.first_output_at = self.last_output_at = now
        total_s = max(now - self.received_at, 0.0)
        if engine is None or engine.first_output_s <= 0:
            self._first = RequestTimes(prefill_s=total_s)
        else:
            wait_s = max(total_s - engine.queue_s - engine.prefill_s, 0.0)
            self._first = RequestTimes(wait_s, engine.queue_s, engine.prefill_s)

    def record_last(self, now: float) -> None:
        """Record the engine's last output."""
        self.last_output_at = now

    def pop_first(self) -> RequestTimes | None:
        """Return the durations up to the first output. Before that output, and from the second call on, return None."""
        first, self._first = self._first, None
        return first

    def pop_all(self, now: float, *, is_parsed: bool = False) -> RequestTimes:
        """Return the durations up to the request's end at `now`, except those that `pop_first` has already returned.

        `is_parsed`: whether the output was parsed. If so, the time since the engine's last output counts as `parse_s`.
        """
        times = self.pop_first() or RequestTimes()
        if self.first_output_at:
            last = self.last_output_at if is_parsed and self.last_output_at > self.first_output_at else now
            times.decode_s = max(last - self.first_output_at, 0.0)
            times.parse_s = max(now - last, 0.0) if is_parsed else 0.0
        return times
