"""Virtual time: a queue of planned actions, ordered by time and then by the order in which they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Planned actions in virtual time. `now` never decreases."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, when: float, action: Action) -> None:
        """Plan an action for a time. A time in the past means now."""
        self._count += 1
        heapq.heappush(self._planned, (max(when, self.now), self._count, action))

    def after(self, seconds: float, action: Action) -> None:
        """Plan an action for `seconds` from now."""
        self.at(self.now + seconds, action)

    def every(self, seconds: float, action: Action) -> None:
        """Run an action every `seconds`, first in `seconds` from now."""

        def repeat() -> None:
            action()
            self.after(seconds, repeat)

        self.after(seconds, repeat)

    def run_until(self, when: float) -> None:
        """Run all actions planned up to `when`."""
        while self._planned and self._planned[0][0] <= when:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = max(self.now, when)

    def __repr__(self) -> str:
        return f"EventQueue({self.now:g} s, {len(self._planned)} planned)"
