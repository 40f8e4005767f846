"""Reports of the states of a worker's adapters to its gateways.

A changed state is reported at once. The adapters in the engine's slots can change with each request, so changes of the
slots are collected and reported later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from cluster.api.adapters import AdapterStatus
from cluster.wire.outbox import Outbox

REPORT_S: Final = 0.1
"""Least time in seconds between two reports to the gateways."""
REPORT_S_EACH: Final = 0.0005
"""Least time in seconds between two reports, per adapter in a report. A gateway processes one adapter in about a
hundredth of this time."""
MOVES: Final = 4
"""Factor by which a report waits longer if only the adapters in the engine's slots have changed."""


class AdapterReports:
    """Reports of the adapters' states to all links of one worker. `statuses`: returns the states of all adapters."""

    def __init__(self, statuses: Callable[[], Sequence[AdapterStatus]], report_s: float = REPORT_S) -> None:
        """Create the sender of reports, at first without links; `run` sends the reports. `statuses`: returns the
        current states of the adapters. `report_s`: minimum time between two reports."""
        self._statuses = statuses
        self._report_s = report_s
        self._links: dict[int, Outbox] = {}
        self._adapters = 0
        """Number of adapters in the last report."""
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, link: int, outbox: Outbox) -> None:
        """Add a link, and send its gateway the states of all adapters. `run` sends later changes."""
        self._links[link] = outbox
        outbox.adapters(self._statuses())

    def detach(self, link: int) -> None:
        """Forget a link that has ended."""
        self._links.pop(link, None)

    def mark_changed(self) -> None:
        """Record that an adapter's state has changed. `run` then reports all states at once."""
        self._changed.set()

    def mark_moved(self) -> None:
        """Record that the adapters in the engine's slots have changed. `run` then reports all states after a delay."""
        if self._timer is None and not self._changed.is_set():
            self._timer = asyncio.get_running_loop().call_later(MOVES * self._pause_s, self._changed.set)

    async def run(self) -> None:
        """Report changes of the adapters' states to all links until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                self._cancel_timer()
                statuses = self._statuses()
                self._adapters = len(statuses)
                for outbox in self._links.values():
                    outbox.adapters(statuses)
                await asyncio.sleep(self._pause_s)
        finally:
            self._cancel_timer()

    @property
    def _pause_s(self) -> float:
        """Least time between two reports, in seconds."""
        return max(self._report_s, REPORT_S_EACH * self._adapters)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
