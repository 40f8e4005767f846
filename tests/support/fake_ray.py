"""A Ray that is as quick as its caller: the fake of rayserve's Backend port."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.control.reconcile import Observed
from cluster.rayserve.backend import RayAway, Snapshot
from cluster.rayserve.settings import ReplicaSettings


@dataclass
class FakeRay:
    """Keeps applications in memory and a journal of what was asked; `away` makes every call fail."""

    nodes: tuple[Mapping[str, float], ...] = ({"CPU": 8.0, "GPU": 8.0},)
    apps: dict[str, Observed] = field(default_factory=dict)
    journal: list[str] = field(default_factory=list)
    away: str = ""

    def change(self, model: str, **fields: object) -> None:
        """What Ray does by itself."""
        self.apps[model] = dataclasses.replace(self.apps[model], **fields)  # type: ignore[arg-type]

    async def observe(self) -> Snapshot:
        """Look."""
        self._answer()
        return Snapshot(dict(self.apps), self.nodes)

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Take an application; no replica has a process yet."""
        self._answer(f"deploy {settings.spec.name}")
        replicas = settings.spec.replicas if settings.replicas is None else settings.replicas
        self.apps[settings.spec.name] = Observed(settings.spec.name, settings.digest, replicas)

    async def scale(self, model: str, replicas: int) -> None:
        """Another count."""
        self._answer(f"scale {model} {replicas}")
        self.change(model, target=replicas)

    async def delete(self, model: str) -> None:
        """Gone at once."""
        self._answer(f"delete {model}")
        del self.apps[model]

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
