"""A fake of the backend in cluster/ray: a Ray in memory that carries out every request at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.catalog.reconcile import Observed, app_parts
from cluster.ray.backend import RayAway, RaySnapshot
from cluster.worker.settings import ReplicaSettings


@dataclass
class FakeRay:
    """A fake Ray with its applications in memory and a journal of requests. `away`: if not empty, the error message
    with which every call fails."""

    nodes: tuple[Mapping[str, float], ...] = ({"CPU": 8.0, "GPU": 8.0},)
    apps: dict[str, Observed] = field(default_factory=dict)
    journal: list[str] = field(default_factory=list)
    away: str = ""
    now_s: float = 0.0
    """Deployment time of applications, in seconds."""

    def change(self, which: str, **fields: object) -> None:
        """Set the attributes `fields` of an application, to simulate a change that Ray makes by itself.

        `which`: the application's name, or the name of a model that has only one application.
        """
        app = which if which in self.apps else self.app_of(which)
        self.apps[app] = dataclasses.replace(self.apps[app], **fields)  # type: ignore[arg-type]

    def app_of(self, model: str, version: str = "v1") -> str:
        """Return the name of the only application of a version."""
        (app,) = [app for app, seen in self.apps.items() if (seen.model, seen.version) == (model, version)]
        return app

    async def observe(self) -> RaySnapshot:
        """Return the current snapshot."""
        self._answer()
        return RaySnapshot(dict(self.apps), self.nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Add an application. No replica of the application has a process yet."""
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
        """Change the number of replicas of an application."""
        self._answer(f"scale {_short(app)} {replicas}")
        self.change(app, target=replicas)

    async def delete(self, app: str) -> None:
        """Remove an application at once."""
        self._answer(f"delete {_short(app)}")
        del self.apps[app]

    async def shutdown(self) -> None:
        """Remove all applications."""
        self._answer("shutdown")
        self.apps.clear()

    async def close(self) -> None:
        """Do nothing."""

    def _answer(self, what: str = "") -> None:
        if self.away:
            raise RayAway(self.away)
        if what:
            self.journal.append(what)


def _short(app: str) -> str:
    """Return a short name of an application for the journal: `m`, or `m@v2` for a version other than v1."""
    model, version, _ = app_parts(app)
    return model if version in ("", "v1") else f"{model}@{version}"
