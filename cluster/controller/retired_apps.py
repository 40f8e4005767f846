"""Retired applications, which get no new calls and are deleted when their last call has ended. Until the workers that
replace theirs have loaded as many adapters, they still get the calls for adapters that no other worker has."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cluster.controller.links import FleetWorker
from cluster.ray.backend import RaySnapshot

QUIET_S = 3.0
"""Seconds after an application's retirement in which a reported load of 0 is not trusted, since it may have been
measured before the retirement."""


class RetiredApps:
    """The retired applications, each with the time of its retirement in seconds since the epoch."""

    def __init__(self, drain_timeout_s: float = 300.0) -> None:
        """`drain_timeout_s`: seconds after which a retired application is deleted even if calls still run on it. These
        calls then resume on other workers or fail."""
        self.drain_timeout_s = drain_timeout_s
        self._since_s: dict[str, float] = {}

    def __contains__(self, app: object) -> bool:
        return app in self._since_s

    def update(self, retired: Collection[str], now_s: float) -> None:
        """Replace the set of retired applications. An application that was in the set before keeps its time of
        retirement; the others get `now_s`."""
        self._since_s = {app: self._since_s.get(app, now_s) for app in retired}

    def deletable(
        self, snapshot: RaySnapshot, fleet: Sequence[FleetWorker], awaited: Collection[str], linked: bool, now_s: float
    ) -> frozenset[str]:
        """Return the applications that may be deleted: those without calls whose workers have no more adapters than one
        that replaces them, and those whose drain timeout is over.

        `awaited`: models with waiting calls. Applications of these models are kept until the drain timeout. `linked`:
        whether a gateway reports the workers' loads. Without reports, all applications are kept until the drain
        timeout.
        """
        retired = {snapshot.apps[app].digest for app in self._since_s if app in snapshot.apps}
        needed = {worker.generation for worker in fleet if worker.running} | _with_more_adapters(fleet, retired)
        deletable = set()
        for app, since_s in self._since_s.items():
            seen = snapshot.apps.get(app)
            quiet = linked and now_s - since_s >= QUIET_S
            idle = seen is not None and seen.digest not in needed and seen.model not in awaited
            if (quiet and idle) or now_s - since_s >= self.drain_timeout_s:
                deletable.add(app)
        return frozenset(deletable)


def _with_more_adapters(fleet: Sequence[FleetWorker], retired: Collection[str]) -> set[str]:
    """Return the generations in `retired` with a worker that has loaded more adapters than every worker of the same
    version that replaces it. Without such workers, the generation is not returned."""
    loaded: dict[tuple[str, str], int] = {}
    for worker in fleet:
        if worker.generation not in retired:
            key = worker.model, worker.version
            loaded[key] = max(loaded.get(key, 0), worker.adapters_ready)
    return {
        worker.generation
        for worker in fleet
        if worker.generation in retired
        and worker.adapters_ready > loaded.get((worker.model, worker.version), worker.adapters_ready)
    }
