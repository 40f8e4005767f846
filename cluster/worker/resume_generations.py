"""The newest known generation of each resumed call. A generation is the number of a call's resume; a worker does not
run requests of older generations.

Problem: a client may resume a stream at another gateway, from any chunk, while the first gateway still serves the
stream. Gateways have no connections to each other, so the first gateway does not learn of the resume. But a worker is
linked to all gateways, or to several if there are many. So a gateway that resumes a call reports the new generation to
every worker that it is linked to, and each worker ends the call's older requests.

Invariant: after a report has arrived, no request of a lower generation of this call runs or starts here. If more than
MOST calls are known, the oldest is forgotten. Pure: no clock, no I/O.
"""

from __future__ import annotations

MOST = 20_000


def call_of(stream: str) -> str:
    """Return the call id in a stream name, which consists of the call id, `#` and the number of the output."""
    return stream.rpartition("#")[0]


class ResumeGenerations:
    """The newest generation (number of a resume) that one worker knows for each call."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._newest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def record(self, call: str, generation: int) -> bool:
        """Record that a call was resumed; return whether `generation` is newer than the known generation of the
        call."""
        if generation <= self._newest.get(call, 0):
            return False
        self._newest.pop(call, None)
        self._newest[call] = generation
        if len(self._newest) > self._most:
            del self._newest[next(iter(self._newest))]
        return True

    def is_outdated(self, stream: str, generation: int) -> bool:
        """Return whether the request's call was resumed again later: whether a higher `generation` (number of a resume)
        of the call is known. `stream`: the request's stream name."""
        return bool(stream) and generation < self._newest.get(call_of(stream), 0)
