"""Desired state of the models: models are wanted (with settings), held (stay unchanged) or leaving (are removed)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cluster.api.adapters import AdapterSpec
from cluster.api.types import ModelSpec
from cluster.policy.catalog.versions import ReplicaShare, VersionOverride, shares
from cluster.worker.settings import ReplicaSettings


class DesiredModels:
    """Desired state of the models, and the overrides of versions.

    A model's variants are its ReplicaSettings: one for each combination of a version and a GPU type that the model may
    use. An override changes what the configuration says about one version. Operators and automatic rollbacks set
    overrides. An override exists only for a version of a wanted model.
    """

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Event that every change sets, so that the next pass of the controller begins at once."""
        self.variants: Mapping[str, tuple[ReplicaSettings, ...]] = {}
        """Variants of each wanted model: the stable version before the canary, the preferred GPU type first."""
        self.overrides: Mapping[str, Mapping[str, VersionOverride]] = {}
        """Overrides of the configuration, by model and version. Operators and automatic rollbacks set overrides."""
        self.adapters: Mapping[str, tuple[AdapterSpec, ...]] = {}
        """Adapters of the wanted models; models without adapters may be absent. A change restarts no replica."""
        self._leaving: dict[str, ModelSpec] = {}
        self._held: dict[str, ModelSpec] = {}
        self._hold_all = False

    def want(
        self, settings: Sequence[ReplicaSettings], adapters: Mapping[str, tuple[AdapterSpec, ...]] | None = None
    ) -> None:
        """Set the replicas that should run, and the adapters of each model.

        `settings` must have this order: the stable version of a model comes before the canary, and the preferred GPU
        type of a version comes first.
        """
        self.adapters = adapters or {}
        wanted: dict[str, tuple[ReplicaSettings, ...]] = {}
        for variant in settings:
            wanted[variant.spec.name] = (*wanted.get(variant.spec.name, ()), variant)
        self._leaving |= {name: variants[0].spec for name, variants in self.variants.items() if name not in wanted}
        self.variants = wanted
        self.restore(self.overrides)

    def hold(self, models: Sequence[ModelSpec], everything: bool = False) -> None:
        """Hold these models: their running replicas stay unchanged, and their names and aliases stay published.

        `everything`: also hold every other running model that is not wanted.
        """
        self._held = {spec.name: spec for spec in models}
        self._hold_all = everything
        self.changed.set()

    def restore(self, overrides: Mapping[str, Mapping[str, VersionOverride]]) -> None:
        """Replace all overrides, which change what the catalog file says about a version. An override of a version that
        is not wanted is dropped."""
        versions = {(model, variant.spec.version) for model, variants in self.variants.items() for variant in variants}
        self.overrides = {
            model: kept
            for model, own in overrides.items()
            if (kept := {version: override for version, override in own.items() if (model, version) in versions})
        }
        self.changed.set()

    def override(self, model: str, version: str, **fields: Any) -> None:
        """Override the configuration of a version until the entry of the version changes. Raises KeyError for unknown
        names."""
        variants, own = self.version(model, version), self.overrides.get(model, {})
        if not variants:
            raise KeyError(version)
        old, digest = own.get(version), variants[0].digest
        override = replace(old if old is not None and old.digest == digest else VersionOverride(digest), **fields)
        self.overrides = {**self.overrides, model: {**own, version: override}}
        self.changed.set()

    def shares(self, model: str) -> tuple[ReplicaShare, ...]:
        """Return the versions of a wanted model, each with a share of the model's calls, the stable version first."""
        stable = self.variants[model][0]
        canary = next((other for other in self.variants[model] if other.spec.version != stable.spec.version), None)
        return shares(
            (stable.spec.version, stable.digest),
            None if canary is None else (canary.spec.version, canary.digest, canary.spec.weight),
            self.overrides.get(model, {}),
        )

    def version(self, model: str, version: str) -> Sequence[ReplicaSettings]:
        """Return the variants of a version, one for each GPU type, the preferred type first."""
        return [variant for variant in self.variants[model] if variant.spec.version == version]

    def stable(self, model: str) -> Sequence[ReplicaSettings]:
        """Return the variants of the model's stable version, the preferred GPU type first."""
        return self.version(model, self.variants[model][0].spec.version)

    def settings(self, app: str) -> ReplicaSettings | None:
        """Return the settings of an application, or None if the application is not wanted."""
        return next(
            (variant for variants in self.variants.values() for variant in variants if variant.app == app), None
        )

    def held(self, on_ray: Collection[str]) -> Mapping[str, ModelSpec]:
        """Return the specs of the models that `hold` has marked, by name, including models without replicas.

        `on_ray`: names of the models that have an application on Ray. After `hold(everything=True)`, the models in
        `on_ray` that are not wanted are held too.
        """
        names = self._held.keys() | (set(on_ray) if self._hold_all else set())
        return {name: self._held.get(name) or ModelSpec(name, "") for name in names - self.variants.keys()}

    def leaving(self, on_ray: Collection[str]) -> Mapping[str, ModelSpec]:
        """Return the models in `on_ray` that must be removed, as specs by name. These are the models that are not
        wanted and are not `held` (kept running because their entry is invalid). Also forgets the specs of models that
        are not in `on_ray`."""
        names = set(on_ray) - self.variants.keys() - self.held(on_ray).keys()
        self._leaving = {name: self._leaving.get(name) or ModelSpec(name, "") for name in names}
        return self._leaving
