"""Several Ray clusters as one backend, so that Ray, Python, CUDA or vLLM are upgraded side by side.

One that does not answer keeps what it was last seen to have, so that nothing of it is made anew elsewhere and the
others go on being driven.
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


class SeveralRays:
    """A Backend of named ones. An application is where its settings say, and is found there again."""

    def __init__(self, rays: Mapping[str, Backend]) -> None:
        """At least one."""
        self._rays = dict(rays)
        self._last: dict[str, RaySnapshot] = {}
        self._where: dict[str, str] = {}
        self._away: dict[str, str] = {}

    def __repr__(self) -> str:
        away = f"; away: {', '.join(self._away)}" if self._away else ""
        return f"SeveralRays({', '.join(self._rays)}{away})"

    async def observe(self) -> RaySnapshot:
        """Look at all of them at once. Raises RayAway when none answers."""
        names = list(self._rays)
        answers = await asyncio.gather(*(self._rays[name].observe() for name in names), return_exceptions=True)
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, RayAway):
                self._lost(name, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._last[name] = answer
                if self._away.pop(name, ""):
                    log.info("ray.back", ray=name)
        if len(self._away) == len(names):
            raise RayAway("; ".join(self._away[name] for name in names))
        return self._together()

    def _lost(self, name: str, error: RayAway) -> None:
        if name not in self._away:
            log.warning("ray.away", ray=name, reason=str(error))
        self._away[name] = f"{name}: {error}"

    def _together(self) -> RaySnapshot:
        apps: dict[str, Observed] = {}
        for name, snapshot in self._last.items():
            apps |= {app: dataclasses.replace(seen, ray=name) for app, seen in snapshot.apps.items()}
        self._where = {app: seen.ray for app, seen in apps.items()}
        nodes = {name: snapshot.nodes for name, snapshot in self._last.items()}
        return RaySnapshot(apps, tuple(node for them in nodes.values() for node in them), nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """On the one that it names."""
        name = settings.ray_cluster
        if name not in self._rays:
            raise RayAway(f"there is no Ray cluster {name!r}")
        await self._rays[name].deploy(settings)

    async def scale(self, app: str, replicas: int) -> None:
        """Where it is."""
        await self._of(app).scale(app, replicas)

    async def delete(self, app: str) -> None:
        """Where it is."""
        await self._of(app).delete(app)

    def _of(self, app: str) -> Backend:
        if app not in self._where:
            raise RayAway(f"no Ray cluster has {app!r}")
        return self._rays[self._where[app]]

    async def shutdown(self) -> None:
        """End Serve on all of them."""
        await asyncio.gather(*(ray.shutdown() for ray in self._rays.values()))

    async def close(self) -> None:
        """Let go of all."""
        await asyncio.gather(*(ray.close() for ray in self._rays.values()))
