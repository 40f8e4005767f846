"""Virtual time: a queue of planned actions, ordered by time. Actions for the same time run in the order of planning."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Queue of planned actions in virtual time. `now` never decreases."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, when: float, action: Action) -> None:
        """Plan an action for the time `when`, in seconds. An action for a past time runs at the current time."""
        self._count += 1
        heapq.heappush(self._planned, (max(when, self.now), self._count, action))

    def after(self, seconds: float, action: Action) -> None:
        """Plan an action `seconds` from now."""
        self.at(self.now + seconds, action)

    def every(self, seconds: float, action: Action) -> None:
        """Run an action every `seconds`. The first run is `seconds` from now."""

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
