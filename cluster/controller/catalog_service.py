"""Operators' changes of the catalog: validated as a whole, stored on disk, then applied by the controller.

On a local cluster (`headrace up`) the configuration file is only the initial catalog: Apply may change every entry, and
the changes hold until the next `up`. On other clusters the file comes from a ConfigMap. There Apply can add models,
which are stored on disk. Apply refuses to change the file's models, since the next ConfigMap would undo the change.
Rolling back a canary and quarantining a version are allowed on every cluster, since an emergency needs them. Both are
overrides of a version, which end when the version's entry changes.

Adapters that are loaded at run time are allowed on every cluster too. They are stored by model, separate from the
entries, so they stay when Apply or the file changes the entry of their model. They are removed with their model.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import structlog

from cluster.api.adapters import AdapterSpec
from cluster.api.catalog import Change
from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CatalogEntry
from cluster.config.adapters import limit_problems
from cluster.config.document import entry_of
from cluster.config.model import Model
from cluster.config.schema import Config
from cluster.controller.desired_models import DesiredModels
from cluster.controller.editable_catalog import EditableCatalog
from cluster.controller.published_catalog import PublishedCatalog
from cluster.policy.catalog import layers
from cluster.policy.catalog.source_texts import without_credentials

log = structlog.get_logger("catalog")

NS_PER_MS: Final = 1_000_000
"""Load numbers are milliseconds since the epoch, so that they stay unique when adapters and controllers change."""


class StoredCatalogService:
    """Implementation of CatalogService (cluster/api/catalog.py). It changes two things: the editable catalog, and the
    overrides of versions in the desired models."""

    def __init__(self, catalog: EditableCatalog, models: DesiredModels, published: PublishedCatalog) -> None:
        """`models`: the desired models that `catalog` changes. `published`: the published catalog, from which the
        methods take the entries that they return."""
        self._catalog = catalog
        self._models = models
        self._published = published

    # ---- verbs

    def diff(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> Sequence[Change]:
        """Return the changes that `apply` would make to the catalog for these entries. Nothing is changed."""
        return self._with_entries(entries, prune=prune)[1]

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """Add or replace entries and return the changes. `prune`: also remove all models that have no entry in
        `entries`. `validate_only`: only return the changes. Raises CallError for a model that only the controller's
        file can change."""
        config, changes = self._with_entries(entries, prune=prune)
        refused = [change.model for change in changes if self._catalog.is_managed_by_file(change.model)]
        if refused:
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{', '.join(refused)}: declared in the controller's file; change the file instead",
                violations=[Violation(f"models[{name}]", "is declared in the controller's file") for name in refused],
            )
        if changes and not validate_only:
            self._catalog.adopt(config)
        return changes

    def _with_entries(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> tuple[Config, Sequence[Change]]:
        """Return the configuration after `entries` are applied, and the changes from the current configuration.
        `prune`: remove models that are not in `entries`. Raises CallError for an invalid entry, and for an entry that
        conflicts with adapters that were loaded at run time."""
        before = {model.name: entry_of(model) for model in self._catalog.config.models}
        config = self._catalog.with_entries(layers.apply_entries(list(before.values()), entries, prune=prune))
        self._catalog.check_loaded(config)
        after = {model.name: entry_of(model) for model in config.models}
        return config, layers.diff(before, after, self._catalog.restarts(config))

    def weigh(self, name: str, version: str, weight: float) -> CatalogEntry:
        """Set a version's share of the model's calls to `weight`. Undoes a rollback of the canary."""
        model, canary = self._with_canary(name)
        if version not in (model.version, canary):
            raise invalid(
                "version", f"{version[:64]!r} is no version of {model.name}; it has {model.version}, {canary}"
            )
        share = weight if version == canary else 1.0 - weight
        return self._override(model.name, canary, weight=share, gone="")

    def promote(self, name: str) -> CatalogEntry:
        """Make the canary the model's stable version."""
        model, canary = self._with_canary(name)
        if self._catalog.is_managed_by_file(model.name):
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{model.name}: declared in the controller's file. In the file, replace the model's own keys by those "
                f"of `canary` (including version: {canary}) and remove `canary`",
            )
        entries = [
            layers.promote_canary(entry_of(other)) if other.name == model.name else entry_of(other)
            for other in self._catalog.config.models
        ]
        self._catalog.adopt(self._catalog.with_entries(entries))
        return self._preview(model.name)

    def roll_back(self, name: str, reason: str) -> CatalogEntry:
        """Withdraw the canary of a model until the model's entry changes."""
        model, canary = self._with_canary(name)
        return self._override(model.name, canary, gone=f"rolled back: {reason}")

    def quarantine(self, name: str, version: str, reason: str, *, lift: bool) -> CatalogEntry:
        """Stop sending calls to a version, or with `lift` resume sending calls to the version."""
        model = self._catalog.find(name)
        versions = [model.version, *([model.canary.version] if model.canary else [])]
        if version not in versions:
            raise invalid("version", f"{version[:64]!r} is no version of {model.name}; it has {', '.join(versions)}")
        entry = self._override(model.name, version, quarantined=not lift)
        log.warning("version.quarantined", model=model.name, version=version, lifted=lift, reason=reason)
        return entry

    def load_adapter(self, name: str, adapter: AdapterSpec) -> tuple[str, AdapterSpec]:
        """Add an adapter to a model, or replace an adapter of the same name that was added in this way. Workers on
        which it has failed try it again. Returns the model's name and the adapter. Raises CallError, for example if
        the model's entry already has an adapter of this name."""
        model = self._catalog.find(name)
        if not model.takes_adapters:
            raise invalid(
                "name",
                f"{model.name} takes no adapters: add `adapters: []` to its entry, which replaces its replicas once",
            )
        self._check_not_configured(model, adapter.name)
        adapter = self._checked(model, adapter)
        loaded = {one.name: one for one in self._catalog.loaded(model)}
        before = loaded.pop(adapter.name, adapter)
        number = max(time.time_ns() // NS_PER_MS, before.load_number + 1)
        adapter = dataclasses.replace(adapter, load_number=number)
        self._catalog.set_loaded(model, (*loaded.values(), adapter))
        log.info("adapter.loaded", model=model.name, adapter=adapter.name, source=without_credentials(adapter.source))
        return model.name, adapter

    def unload_adapter(self, name: str, adapter: str) -> tuple[str, AdapterSpec]:
        """Remove an adapter that `load_adapter` has added, also if the model's entry has declared an adapter of the
        same name since then. The declared one stays. Returns the model's name and the adapter. Raises CallError for
        any other adapter."""
        model = self._catalog.find(name)
        loaded = self._catalog.loaded(model)
        found = next((one for one in loaded if one.name == adapter), None)
        if found is None:
            self._check_not_configured(model, adapter)
            names = ", ".join(one.name for one in loaded) or "none"
            raise CallError(
                Outcome.NOT_FOUND, f"{model.name} has no adapter {adapter[:64]!r} that was loaded; there are {names}"
            )
        self._catalog.set_loaded(model, tuple(one for one in loaded if one is not found))
        log.info("adapter.unloaded", model=model.name, adapter=adapter)
        return model.name, found

    def _check_not_configured(self, model: Model, adapter: str) -> None:
        if any(one.name == adapter for one in model.adapter_specs()):
            where = (
                "controller's file"
                if self._catalog.is_managed_by_file(model.name)
                else "model's entry, which `apply` changes"
            )
            raise CallError(
                Outcome.MANAGED_BY_FILE, f"{model.name}:{adapter} is declared in the {where}; change it there"
            )

    def _checked(self, model: Model, adapter: AdapterSpec) -> AdapterSpec:
        """Check an adapter by the rules of the configuration, as if the model's entry had it, and the number of the
        model's adapters and tenants. The model's other loaded adapters are not checked again, because they may be
        older than the model's entry. Raises CallError."""
        configured = model.adapter_specs()
        entries = [
            entry_of(other)
            if other.name != model.name
            else entry_of(other) | {"adapters": [one.as_entry() for one in (*configured, adapter)]}
            for other in self._catalog.config.models
        ]
        try:
            config = self._catalog.with_entries(entries)
        except CallError as error:
            place = re.compile(rf"^models\[{re.escape(model.name)}\]\.adapters\[{len(configured)}\]\.")
            violations = [
                Violation("adapter" if (field := place.sub("", one.field)) == "name" else field, one.description)
                for one in error.violations
            ]
            message = "; ".join(f"{one.field}: {one.description}" for one in violations)
            raise CallError(error.outcome, message, violations=violations) from None
        specs = next(other for other in config.models if other.name == model.name).adapter_specs()
        names = {spec.name for spec in specs}
        others = [one for one in self._catalog.loaded(model) if one.name not in names]
        for problem in limit_problems([*specs, *others]):
            raise invalid(f"models[{model.name}].adapters", problem.text)
        return specs[-1]

    def _override(self, model: str, version: str, **fields: Any) -> CatalogEntry:
        """Override fields of a version, and store the overrides. Returns the model's entry as it will be published."""
        self._models.override(model, version, **fields)
        self._catalog.store()
        return self._preview(model)

    def _preview(self, model: str) -> CatalogEntry:
        return self._published.preview(self._models.stable(model)[0].spec, self._models.shares(model))

    def _with_canary(self, name: str) -> tuple[Model, str]:
        """Return a model and the version of the model's canary. Raises CallError for a model without a canary."""
        model = self._catalog.find(name)
        if model.canary is None:
            raise invalid("name", f"{model.name} has no canary: add `canary` to its entry first")
        return model, model.canary.version
