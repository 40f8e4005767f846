"""A Ray that is as quick as its caller: the fake of rayserve's Backend port."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.catalog.reconcile import Observed, app_parts
from cluster.ray.backend import RayAway, RaySnapshot
from cluster.worker.settings import ReplicaSettings


@dataclass
class FakeRay:
    """Keeps applications in memory and a journal of what was asked; `away` makes every call fail."""

    nodes: tuple[Mapping[str, float], ...] = ({"CPU": 8.0, "GPU": 8.0},)
    apps: dict[str, Observed] = field(default_factory=dict)
    journal: list[str] = field(default_factory=list)
    away: str = ""
    now_s: float = 0.0
    """When applications are deployed."""

    def change(self, which: str, **fields: object) -> None:
        """What Ray does by itself to an application, or to the only one of a model."""
        app = which if which in self.apps else self.app_of(which)
        self.apps[app] = dataclasses.replace(self.apps[app], **fields)  # type: ignore[arg-type]

    def app_of(self, model: str, version: str = "v1") -> str:
        """The name of a version's only application."""
        (app,) = [app for app, seen in self.apps.items() if (seen.model, seen.version) == (model, version)]
        return app

    async def observe(self) -> RaySnapshot:
        """Look."""
        self._answer()
        return RaySnapshot(dict(self.apps), self.nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Take an application; no replica has a process yet."""
        self._answer(f"deploy {_short(settings.app)}")
        replicas = settings.spec.replicas if settings.replicas is None else settings.replicas
        made = Observed(
            settings.spec.name,
            settings.digest,
            replicas,
            version=settings.spec.version,
            ray=settings.ray_cluster,
            deployed_at_s=self.now_s,
            gpu=settings.spec.gpu,
        )
        self.apps[settings.app] = made

    async def scale(self, app: str, replicas: int) -> None:
        """Another count."""
        self._answer(f"scale {_short(app)} {replicas}")
        self.change(app, target=replicas)

    async def delete(self, app: str) -> None:
        """Gone at once."""
        self._answer(f"delete {_short(app)}")
        del self.apps[app]

    async def shutdown(self) -> None:
        """All gone."""
        self._answer("shutdown")
        self.apps.clear()

    async def close(self) -> None:
        """Nothing is held."""

    def _answer(self, what: str = "") -> None:
        if self.away:
            raise RayAway(self.away)
        if what:
            self.journal.append(what)


def _short(app: str) -> str:
    """`m`, or `m@v2` of another version than the first, since what it was started with is long."""
    model, version, _ = app_parts(app)
    return model if version in ("", "v1") else f"{model}@{version}"
