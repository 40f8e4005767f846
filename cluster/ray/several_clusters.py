"""Several Ray clusters as one backend, so that Ray, Python, CUDA or vLLM can be upgraded side by side.

If a Ray cluster does not answer, its last snapshot stays in use. So its applications are not deployed again elsewhere,
and the other clusters are still managed.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

import structlog

from cluster.policy.catalog.reconcile import Observed
from cluster.ray.backend import Backend, RayAway, RaySnapshot
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("controller")


class MultiClusterBackend:
    """A Backend that combines several named Backends.

    An application's settings name the Ray cluster on which the application is deployed.
    """

    def __init__(self, rays: Mapping[str, Backend]) -> None:
        """Create a backend of at least one Ray cluster. `rays`: the backend of each Ray cluster, by the cluster's
        name."""
        self._rays = dict(rays)
        self._last: dict[str, RaySnapshot] = {}
        self._cluster_of: dict[str, str] = {}
        self._away: dict[str, str] = {}

    def __repr__(self) -> str:
        away = f"; away: {', '.join(self._away)}" if self._away else ""
        return f"MultiClusterBackend({', '.join(self._rays)}{away})"

    def answers(self) -> Mapping[str, bool]:
        """Return for each Ray cluster, by name, whether it answered the last `observe`. Clusters that were never
        observed are missing."""
        return {name: name not in self._away for name in self._rays if name in self._away or name in self._last}

    async def observe(self) -> RaySnapshot:
        """Observe all Ray clusters concurrently. Raises RayAway if no cluster answers."""
        names = list(self._rays)
        answers = await asyncio.gather(*(self._rays[name].observe() for name in names), return_exceptions=True)
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, RayAway):
                self._record_away(name, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._last[name] = answer
                if self._away.pop(name, ""):
                    log.info("ray.recovered", ray=name)
        if len(self._away) == len(names):
            raise RayAway("; ".join(self._away[name] for name in names))
        return self._merged()

    def _record_away(self, name: str, error: RayAway) -> None:
        if name not in self._away:
            log.warning("ray.lost", ray=name, reason=str(error))
        self._away[name] = f"{name}: {error}"

    def _merged(self) -> RaySnapshot:
        apps: dict[str, Observed] = {}
        for name, snapshot in self._last.items():
            apps |= {app: dataclasses.replace(seen, ray=name) for app, seen in snapshot.apps.items()}
        self._cluster_of = {app: seen.ray for app, seen in apps.items()}
        nodes = {name: snapshot.nodes for name, snapshot in self._last.items()}
        return RaySnapshot(apps, tuple(node for nodes_of_one in nodes.values() for node in nodes_of_one), nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy an application on the Ray cluster that `settings` name."""
        name = settings.ray_cluster
        if name not in self._rays:
            raise RayAway(f"there is no Ray cluster {name!r}; there are {', '.join(self._rays)}")
        await self._rays[name].deploy(settings)

    async def scale(self, app: str, replicas: int) -> None:
        """Set the number of replicas of an application, on the Ray cluster that has the application."""
        await self._backend_of(app).scale(app, replicas)

    async def delete(self, app: str) -> None:
        """Drain and remove an application, on the Ray cluster that has the application."""
        await self._backend_of(app).delete(app)

    def _backend_of(self, app: str) -> Backend:
        if app not in self._cluster_of:
            raise RayAway(f"no Ray cluster has the application {app!r}")
        return self._rays[self._cluster_of[app]]

    async def shutdown(self) -> None:
        """Shut down Serve on all clusters."""
        await asyncio.gather(*(ray.shutdown() for ray in self._rays.values()))

    async def close(self) -> None:
        """Release all connections."""
        await asyncio.gather(*(ray.close() for ray in self._rays.values()))
