"""Workers whose links have ended unexpectedly. Each worker is kept for a minute, together with the number of its
sequences that other workers have resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cluster.gateway.console.overview.rows import LOST, Row, worker_row
from cluster.gateway.links.worker_link import WorkerLink

KEPT_S: Final = 60.0
"""Seconds for which a lost worker is kept."""
MAX_LOST: Final = 1000
MAX_REASON_CHARS: Final = 256


@dataclass(slots=True)
class LostWorker:
    """A lost worker. `link`: name of its link, which has ended. `row`: its last state. `at`: monotonic seconds.
    `resumed`: number of the worker's sequences that were sent to another worker after the loss."""

    link: str
    row: Row
    at: float
    resumed: int = 0


class LostWorkers:
    """The lost workers of one gateway process, keyed by worker id."""

    def __init__(self) -> None:
        self._workers: dict[str, LostWorker] = {}
        self._resent: dict[str, int] = {}
        """Numbers of sequences that were sent to another worker, by the name of the link that they had lost. Sequences
        may leave a link before the link's end is reported here."""

    def link_down(self, link: WorkerLink, why: str, now: float) -> None:
        """Record the end of a link. The worker counts as lost if it was not draining."""
        if link.draining:
            return
        if len(self._workers) >= MAX_LOST:
            del self._workers[next(iter(self._workers))]
        row = worker_row(link) | {
            "state": LOST,
            "running": 0,
            "waiting": 0,
            "lost_reason": (link.engine_ended or why)[:MAX_REASON_CHARS],
        }
        self._workers[_worker_of(link.name)] = LostWorker(link.name, row, now, self._resent.pop(link.name, 0))

    def link_up(self, link: WorkerLink) -> None:
        """Record that a worker is linked again, so that it no longer counts as lost."""
        self._workers.pop(_worker_of(link.name), None)

    def resent(self, lost_link: str) -> None:
        """Record that a sequence that was lost with the link `lost_link` was sent to another worker."""
        lost = self._workers.get(_worker_of(lost_link))
        if lost is not None and lost.link == lost_link:
            lost.resumed += 1
            return
        if len(self._resent) >= MAX_LOST:
            self._resent.clear()
        self._resent[lost_link] = self._resent.get(lost_link, 0) + 1

    def current(self, now: float) -> Sequence[LostWorker]:
        """Return the workers that were lost within the last KEPT_S, and forget the others."""
        for worker_id, lost in list(self._workers.items()):
            if now - lost.at > KEPT_S:
                del self._workers[worker_id]
        return list(self._workers.values())


def _worker_of(link: str) -> str:
    """Return the model and the worker id in the name of a link."""
    return link.rsplit("/", 2)[0]
