"""Changes of a model under load: a canary, a manual rollback of the canary, a changed entry, and a bad canary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.controller.controller import Controller
from cluster.worker.settings import ReplicaSettings

STREAM_S = (5.0, 300.0)
TRIAL_WEIGHT = 0.3
TRIED, TAKEN_BACK, CHANGED, BAD = 0.15, 0.4, 0.5, 0.7
"""Beginning of each change, as a fraction of the time of the run."""
LOOK_S = 0.25


class Changes:
    """Driver that changes the controller's target and records when each change was complete."""

    def __init__(self, controller: Controller, settings: ReplicaSettings, slow_source: str) -> None:
        """Create a driver that has made no change yet. `settings`: the model's present settings, which the changes
        start from. `slow_source`: source of a version of the model that emits first tokens late."""
        self._controller = controller
        self._settings = settings
        self._slow_source = slow_source
        self.completed: dict[str, Any] = {}

    async def play(self, seconds: float) -> None:
        """Play all changes. Each begins at a fixed fraction of `seconds`, or when the previous change has ended if that
        is later."""
        began = time.monotonic()

        async def at(part: float) -> None:
            await asyncio.sleep(max(began + part * seconds - time.monotonic(), 0.0))

        own = self._settings
        spec = own.spec
        await at(TRIED)
        trial = replace(spec, version="v2", weight=TRIAL_WEIGHT)
        self._controller.models.want([_with_spec_fields(own, weight=1 - TRIAL_WEIGHT), replace(own, spec=trial)])
        await self._until("a trial serves", lambda: self._serves("v2"), seconds)
        await at(TAKEN_BACK)
        self._controller.models.override(spec.name, "v2", gone="by hand")
        await self._until("the trial is gone", lambda: not self._exists("v2"), 2 * seconds)
        await at(CHANGED)
        changed = _with_spec_fields(own, source=spec.source + "&seed=0", weight=1.0)
        self._controller.models.want([changed])
        await self._until("the entry is replaced", lambda: self._replaced(changed), 2 * seconds)
        await at(BAD)
        bad = replace(changed.spec, version="v3", source=self._slow_source, weight=TRIAL_WEIGHT, ttft_ratio=1.2)
        self._controller.models.want([_with_spec_fields(changed, weight=1 - TRIAL_WEIGHT), replace(changed, spec=bad)])
        await self._until("the bad trial took itself back", lambda: self._taken_back("v3"), 2 * seconds)

    async def _until(self, what: str, holds: Callable[[], bool], most_s: float) -> None:
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > most_s:
                self.completed[what] = None
                return
            await asyncio.sleep(LOOK_S)
        self.completed[what] = f"after {time.monotonic() - began:.1f} s"
        print(what, self.completed[what], flush=True)

    def _version_share(self, version: str) -> Any:
        entries = {entry.name: entry for entry in self._controller.catalog.entries()}
        return next((share for share in entries[self._settings.spec.name].versions if share.version == version), None)

    def _serves(self, version: str) -> bool:
        share = self._version_share(version)
        return share is not None and share.replicas > 0

    def _exists(self, version: str) -> bool:
        share = self._version_share(version)
        return share is not None and share.replicas > 0

    def _taken_back(self, version: str) -> bool:
        share = self._version_share(version)
        return share is not None and "rolled back by itself" in share.state_reason

    def _replaced(self, settings: ReplicaSettings) -> bool:
        """Return whether every linked worker of the model has these settings."""
        fleet = [worker for worker in self._controller.gateways.fleet() if worker.model == settings.spec.name]
        return bool(fleet) and all(worker.generation == settings.digest for worker in fleet)


def _with_spec_fields(settings: ReplicaSettings, **fields: Any) -> ReplicaSettings:
    return replace(settings, spec=replace(settings.spec, **fields))
