"""Times of one request on its worker. They are measured only for a sampled call, which is a call whose trace is
recorded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestTimes:
    """Durations of the phases of a request on a worker, in seconds; 0 if unknown.

    The fields are durations and not points in time, since two machines' clocks differ.

    `wait_s`: time on the worker but outside the engine before the first output, mostly before the request enters the
    engine's queue. `queue_s`: time in the engine's queue. `prefill_s`: from the request's first step to the first
    output. `decode_s`: from the first output to the last. `parse_s`: time to parse the last output after the engine
    has returned it.
    """

    wait_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    parse_s: float = 0.0

    @property
    def first_output_s(self) -> float:
        """Seconds from the arrival at the worker to the first output."""
        return self.wait_s + self.queue_s + self.prefill_s

    def update(self, later: RequestTimes) -> None:
        """Overwrite each duration with the duration in `later`. A duration that is 0 in `later` overwrites nothing."""
        self.wait_s = later.wait_s or self.wait_s
        self.queue_s = later.queue_s or self.queue_s
        self.prefill_s = later.prefill_s or self.prefill_s
        self.decode_s = later.decode_s or self.decode_s
        self.parse_s = later.parse_s or self.parse_s
