"""Times of a request of a sampled call on its worker. Requests of other calls are not timed."""

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
        """Record the engine's first output. `engine`: durations that the engine has measured, if it has. What the
        engine has not measured counts as wait if it has measured something, else as prefill."""
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
        """Return the durations up to the first output, once."""
        first, self._first = self._first, None
        return first

    def pop_all(self, now: float, *, is_parsed: bool = False) -> RequestTimes:
        """Return the durations up to the end, which is now, without those that `pop_first` has returned."""
        times = self.pop_first() or RequestTimes()
        if self.first_output_at:
            last = self.last_output_at if is_parsed and self.last_output_at > self.first_output_at else now
            times.decode_s = max(last - self.first_output_at, 0.0)
            times.parse_s = max(now - last, 0.0) if is_parsed else 0.0
        return times
