"""The newest known generation of each resumed call; a worker does not run requests of older generations.

Problem: a client may resume a stream at another gateway, from any chunk, while the first gateway still serves the
stream. Each resume gets a higher generation, but gateways have no connections to each other, so the first gateway does
not learn of the resume. Workers, however, are linked to all gateways, or to several if there are many. So a gateway
that resumes a call reports the generation to every worker that it is linked to, and each worker ends the call's older
requests. Invariant: after a report has arrived, no request of a lower generation of that call runs or starts here.
Beyond MOST calls the oldest are forgotten. Pure: no clock, no I/O.
"""

from __future__ import annotations

MOST = 20_000


def call_of(stream: str) -> str:
    """Return the call id in a stream's name, which consists of the call id, `#` and the number of the output."""
    return stream.rpartition("#")[0]


class ResumeGenerations:
    """The newest generation of each call that one worker knows."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._newest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def record(self, call: str, generation: int) -> bool:
        """Record a call's resume; return whether its generation is newer than the known generation."""
        if generation <= self._newest.get(call, 0):
            return False
        self._newest.pop(call, None)
        self._newest[call] = generation
        if len(self._newest) > self._most:
            del self._newest[next(iter(self._newest))]
        return True

    def is_outdated(self, stream: str, generation: int) -> bool:
        """Return whether a newer generation of the request's call is known."""
        return bool(stream) and generation < self._newest.get(call_of(stream), 0)
