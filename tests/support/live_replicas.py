"""A Backend whose applications are real replicas in this process: the behaviour of Ray without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Coroutine, Mapping
from typing import Any

from cluster.policy.catalog.reconcile import Observed
from cluster.ray.backend import RaySnapshot
from cluster.worker.open_model import open_model
from cluster.worker.replica import Replica, ReplicaPlacement
from cluster.worker.settings import ModelRefused, ReplicaSettings


@dataclasses.dataclass(eq=False)
class _App:
    settings: ReplicaSettings
    target: int
    deployed_at_s: float
    replicas: list[Replica] = dataclasses.field(default_factory=list)
    starting: int = 0
    leaving: int = 0
    trouble: str = ""
    deleting: bool = False


class LiveReplicas:
    """Backend with room for at most `gpus` replicas. A draining replica keeps its GPU until it has drained."""

    def __init__(self, gpus: int = 100) -> None:
        self._gpus = gpus
        self._apps: dict[str, _App] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def observe(self) -> RaySnapshot:
        """Return the current snapshot."""
        apps = {
            name: Observed(
                model=app.settings.spec.name,
                digest=app.settings.digest,
                target=app.target,
                running=len(app.replicas),
                placed=app.starting,
                leaving=app.leaving,
                gave_up=bool(app.trouble),
                refused=bool(app.trouble),
                trouble=app.trouble,
                deleting=app.deleting,
                deployed_at_s=app.deployed_at_s,
                version=app.settings.spec.version,
                gpu=app.settings.spec.gpu,
            )
            for name, app in self._apps.items()
        }
        nodes: tuple[Mapping[str, float], ...] = ({"CPU": 64.0, "GPU": 64.0},)
        return RaySnapshot(apps, nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Create an application and start as many of its replicas as fit."""
        replicas = settings.spec.replicas if settings.replicas is None else settings.replicas
        self._apps[settings.app] = _App(settings, replicas, time.time())
        self._fill()

    async def scale(self, app: str, replicas: int) -> None:
        """Change the number of replicas of an application. The newest replicas leave first."""
        application = self._apps[app]
        application.target = replicas
        while len(application.replicas) > replicas:
            self._leave(application, application.replicas.pop())
        self._fill()

    async def delete(self, app: str) -> None:
        """Drain every replica of an application, then remove the application."""
        application = self._apps[app]
        application.deleting, application.target = True, 0
        while application.replicas:
            self._leave(application, application.replicas.pop())
        self._forget(app)

    async def shutdown(self) -> None:
        """Delete all applications."""
        for app in list(self._apps):
            await self.delete(app)

    async def close(self) -> None:
        """Wait until all leaving replicas are gone."""
        await asyncio.gather(*self._tasks)

    def _fill(self) -> None:
        used = sum(len(app.replicas) + app.starting + app.leaving for app in self._apps.values())
        for app in self._apps.values():
            while len(app.replicas) + app.starting < app.target and used < self._gpus and not app.trouble:
                app.starting += 1
                used += 1
                self._do(self._start(app))

    async def _start(self, app: _App) -> None:
        replica = Replica(
            app.settings, ReplicaPlacement(uuid.uuid4().hex[:8], "node"), open_model, on_engine_death=lambda _: None
        )
        try:
            await replica.start()
        except ModelRefused as error:
            app.trouble = error.reason
            return
        finally:
            app.starting -= 1
        if len(app.replicas) < app.target:
            app.replicas.append(replica)
        else:
            self._leave(app, replica)

    def _leave(self, app: _App, replica: Replica) -> None:
        app.leaving += 1
        self._do(self._stop(app, replica))

    async def _stop(self, app: _App, replica: Replica) -> None:
        try:
            await replica.stop()
        finally:
            app.leaving -= 1
            self._forget(app.settings.app)
            self._fill()

    def _forget(self, name: str) -> None:
        app = self._apps.get(name)
        if app is not None and app.deleting and not app.leaving and not app.starting:
            del self._apps[name]

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
