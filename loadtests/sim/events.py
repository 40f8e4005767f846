"""Virtual time: what is to happen, by time, and of those at one time in the order in which they were planned."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Agenda:
    """The future. `now` only grows."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, when: float, action: Action) -> None:
        """Plan it; what is past happens now."""
        self._count += 1
        heapq.heappush(self._planned, (max(when, self.now), self._count, action))

    def after(self, seconds: float, action: Action) -> None:
        """Plan it for then."""
        self.at(self.now + seconds, action)

    def every(self, seconds: float, action: Action) -> None:
        """From then on, again and again."""

        def again() -> None:
            action()
            self.after(seconds, again)

        self.after(seconds, again)

    def run_until(self, when: float) -> None:
        """Let all happen that is planned till then."""
        while self._planned and self._planned[0][0] <= when:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = max(self.now, when)

    def __repr__(self) -> str:
        return f"Agenda({self.now:g} s, {len(self._planned)} planned)"
