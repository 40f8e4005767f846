"""Engines that ended recently, and the reasons. A worker reports the end of its engine to the gateways, and the
gateways report it to the controller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.api.types import WorkerIdentity
from cluster.link.v1 import link_pb2 as pb

KEPT_S = 600.0
MAX_KEPT = 64


@dataclass(frozen=True, slots=True)
class LostEngine:
    """The end of one engine. `at_s`: time of the end, in seconds since the epoch."""

    worker_id: str
    incarnation: str
    model: str
    version: str
    generation: str
    node: str
    reason: str
    at_s: float


class LostEngines:
    """A gateway's list of the engines that ended recently."""

    def __init__(self) -> None:
        self._kept: deque[LostEngine] = deque(maxlen=MAX_KEPT)

    def add(self, worker: WorkerIdentity, reason: str, at_s: float) -> None:
        """Record the end of an engine."""
        self._kept.append(
            LostEngine(
                worker.worker_id,
                worker.incarnation,
                worker.model,
                worker.version,
                worker.generation,
                worker.node,
                reason,
                at_s,
            )
        )

    def recent(self, now_s: float) -> list[LostEngine]:
        """Return the engines that ended in the last KEPT_S seconds, oldest first."""
        while self._kept and self._kept[0].at_s < now_s - KEPT_S:
            self._kept.popleft()
        return list(self._kept)

    def to_pb(self, now_s: float) -> list[pb.LostEngine]:
        """Encode the engines that ended recently, for the controller."""
        return [
            pb.LostEngine(
                worker_id=engine.worker_id,
                incarnation=engine.incarnation,
                model=engine.model,
                version=engine.version,
                generation=engine.generation,
                node=engine.node,
                reason=engine.reason,
                at_s=engine.at_s,
            )
            for engine in self.recent(now_s)
        ]


def from_pb(lost: Iterable[pb.LostEngine]) -> list[LostEngine]:
    """Decode ended engines, the inverse of `LostEngines.to_pb`."""
    return [
        LostEngine(
            engine.worker_id,
            engine.incarnation,
            engine.model,
            engine.version,
            engine.generation,
            engine.node,
            engine.reason,
            engine.at_s,
        )
        for engine in lost
    ]


def merge_reports(reports: Iterable[Iterable[LostEngine]]) -> list[LostEngine]:
    """Merge the reports of several gateways. The result has each engine once, by its earliest report, in chronological
    order."""
    ends: dict[str, LostEngine] = {}
    for engine in sorted((engine for report in reports for engine in report), key=lambda engine: engine.at_s):
        ends.setdefault(engine.incarnation, engine)
    return list(ends.values())
