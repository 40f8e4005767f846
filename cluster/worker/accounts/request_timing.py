"""Measurement of how long the stages of a request take in a worker. Only requests of sampled calls are measured."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.api.request_times import RequestTimes


@dataclass(slots=True)
class RequestTiming:
    """Points in time of one request, in monotonic seconds; 0 for a point that has not come."""

    received_at: float
    first_output_at: float = 0.0
    last_output_at: float = 0.0
    _first: RequestTimes | None = None

    def record_first(self, engine: RequestTimes | None, now: float) -> None:
        """Record the engine's first output. `engine`: the durations that the engine has measured, if any. The rest of
        the time since the request was received counts as `wait_s`. Without measured durations, all of that time counts
        as `prefill_s`."""
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
        """Return the durations up to the first output, once. Returns None before that output and in later calls."""
        first, self._first = self._first, None
        return first

    def pop_all(self, now: float, *, is_parsed: bool = False) -> RequestTimes:
        """Return the durations up to the request's end at `now`, without the durations that `pop_first` has returned.
        `is_parsed`: whether the output was parsed, so that `parse_s` is measured."""
        times = self.pop_first() or RequestTimes()
        if self.first_output_at:
            last = self.last_output_at if is_parsed and self.last_output_at > self.first_output_at else now
            times.decode_s = max(last - self.first_output_at, 0.0)
            times.parse_s = max(now - last, 0.0) if is_parsed else 0.0
        return times
