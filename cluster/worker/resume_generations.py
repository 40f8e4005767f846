"""Which generation of a resumed call is the newest that a worker knows of: requests of older ones are not run.

Problem: a client may resume a stream at another gateway while the first still serves it, and at any chunk of it. Each
resumption has a higher generation, by one atomic write; but the gateways do not know each other. Workers know all of
them: what a gateway took over it tells every worker, and each of these ends what it runs of the call for others.
Invariant: after a takeover has arrived no request of a lower generation of that call runs or begins here.
What is known of the oldest calls is forgotten beyond MOST. Pure: no clock, no I/O.
"""

from __future__ import annotations

MOST = 20_000


def call_of(stream: str) -> str:
    """The call of a stream's name, which ends with the number of one of its choices."""
    return stream.rpartition("#")[0]


class ResumeGenerations:
    """Of one worker."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._newest: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def took_over(self, call: str, generation: int) -> bool:
        """A call was resumed; whether this is news."""
        if generation <= self._newest.get(call, 0):
            return False
        self._newest.pop(call, None)
        self._newest[call] = generation
        if len(self._newest) > self._most:
            del self._newest[next(iter(self._newest))]
        return True

    def outdated(self, stream: str, generation: int) -> bool:
        """Whether a request belongs to a reader that another one has followed."""
        return bool(stream) and generation < self._newest.get(call_of(stream), 0)
