"""Engines that ended a short while ago, and why: workers tell their gateways, and those the controller."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.api.types import WorkerIdentity
from cluster.link.v1 import link_pb2 as pb

KEPT_S = 600.0
MOST_KEPT = 64


@dataclass(frozen=True, slots=True)
class LostEngine:
    """One engine's end. `at_s`: since the epoch."""

    worker_id: str
    incarnation: str
    model: str
    version: str
    generation: str
    node: str
    reason: str
    at_s: float


class LostEngines:
    """A gateway's own record of them."""

    def __init__(self) -> None:
        self._kept: deque[LostEngine] = deque(maxlen=MOST_KEPT)

    def add(self, worker: WorkerIdentity, reason: str, at_s: float) -> None:
        """One has ended."""
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
        """Those of the last minutes, the oldest first."""
        while self._kept and self._kept[0].at_s < now_s - KEPT_S:
            self._kept.popleft()
        return list(self._kept)

    def to_pb(self, now_s: float) -> list[pb.LostEngine]:
        """Those of the last minutes, for the controller."""
        return [
            pb.LostEngine(
                worker_id=one.worker_id,
                incarnation=one.incarnation,
                model=one.model,
                version=one.version,
                generation=one.generation,
                node=one.node,
                reason=one.reason,
                at_s=one.at_s,
            )
            for one in self.recent(now_s)
        ]


def from_pb(lost: Iterable[pb.LostEngine]) -> list[LostEngine]:
    """What `LostEngines.to_pb` made."""
    return [
        LostEngine(
            one.worker_id,
            one.incarnation,
            one.model,
            one.version,
            one.generation,
            one.node,
            one.reason,
            one.at_s,
        )
        for one in lost
    ]


def merged(reports: Iterable[Iterable[LostEngine]]) -> list[LostEngine]:
    """Each engine's end once, as the first gateway saw it, the oldest first."""
    ends: dict[str, LostEngine] = {}
    for one in sorted((one for report in reports for one in report), key=lambda one: one.at_s):
        ends.setdefault(one.incarnation, one)
    return list(ends.values())
