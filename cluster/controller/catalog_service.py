"""Operators' changes of the catalog: validated as a whole, stored on disk, then applied by the controller.

On a local cluster (`headrace up`) the configuration file is only the initial catalog: Apply may change every entry, and
the changes hold until the next `up`. On other clusters the file comes from a ConfigMap. There Apply can add models,
which are stored on disk. Apply refuses to change the file's models, since the next ConfigMap would undo the change.
Rolling back a canary and quarantining a version are allowed on every cluster, since an emergency needs them. Both are
overrides of a version, which end when the version's entry changes.

Adapters that are loaded at run time are allowed on every cluster too. They are kept beside the entries, by model, so
that neither Apply nor a change of the file removes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from cluster.api.adapters import AdapterSpec
from cluster.api.catalog import Change
from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CatalogEntry
from cluster.config.schema import Config, Model, entry_of, with_models
from cluster.controller.desired_models import DesiredModels
from cluster.controller.published_catalog import PublishedCatalog
from cluster.policy.catalog import layers
from cluster.policy.catalog.versions import VersionOverride
from cluster.process.private_files import replace_file
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("catalog")


@dataclass(frozen=True, slots=True)
class StoredCatalog:
    """Stored changes to the catalog of the configuration file: entries of models, overrides by model and version, and
    adapters that were loaded at run time, by model."""

    models: Sequence[Mapping[str, Any]] = ()
    overrides: Mapping[str, Mapping[str, VersionOverride]] = field(default_factory=dict)
    adapters: Mapping[str, tuple[AdapterSpec, ...]] = field(default_factory=dict)


class StoredCatalogFile:
    """File with the stored changes of the catalog. The next controller of the same cluster continues from this file.

    `life`: the instance of a local cluster, else empty. A file of another instance is ignored. `on_stored` is called
    after each change of the file.
    """

    def __init__(self, path: Path, life: str, on_stored: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._life = life
        self._on_stored = on_stored

    def read(self) -> StoredCatalog | None:
        """Return the stored changes, or None if the file is missing, unreadable or from another instance."""
        try:
            values = json.loads(self._path.read_text())
            if values["life"] != self._life:
                return None
            overrides = {
                model: {version: VersionOverride.from_json(override) for version, override in versions.items()}
                for model, versions in values["marks"].items()
            }
            adapters = {
                model: tuple(_adapter_from_json(adapter) for adapter in of_model)
                for model, of_model in values.get("adapters", {}).items()  # older releases write none
            }
            return StoredCatalog(values["models"], overrides, adapters)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.warning("catalog.copy_not_read", path=str(self._path), reason=str(error))
            return None

    def keep(self, kept: StoredCatalog) -> None:
        """Replace the content of the file atomically with `kept`. Raises OSError."""
        overrides = {
            model: {version: override.as_json() for version, override in versions.items()}
            for model, versions in kept.overrides.items()
        }
        values: dict[str, Any] = {
            "life": self._life,
            "models": [dict(entry) for entry in kept.models],
            "marks": overrides,
        }
        if kept.adapters:
            values["adapters"] = {
                model: [dataclasses.asdict(adapter) for adapter in adapters]
                for model, adapters in kept.adapters.items()
            }
        replace_file(self._path, json.dumps(values, indent=1))
        self._on_stored()


def _adapter_from_json(values: Mapping[str, Any]) -> AdapterSpec:
    return AdapterSpec(**{**values, "tenants": tuple(values["tenants"])})


class StoredCatalogService:
    """Implements CatalogService (cluster/api/catalog.py): changes the controller's desired models, and stores the
    changes in a file."""

    def __init__(
        self,
        config: Config,
        models: DesiredModels,
        catalog: PublishedCatalog,
        file: StoredCatalogFile,
        settings_of: Callable[[Config], Sequence[ReplicaSettings]],
        *,
        by_file: bool,
        held: Collection[str] = (),
        on_want: Callable[[Sequence[ReplicaSettings]], None] = lambda settings: None,
    ) -> None:
        """Restore the stored changes, and set the resulting catalog in `models`.

        `config`: the configuration from the file. `catalog`: the catalog as last published, for answers. `settings_of`:
        function that returns the replica settings of a configuration. `by_file`: whether the models of the file can be
        changed in the file only. `held`: names of models whose entries in the file are invalid. `on_want`: function
        that is called with the replica settings of each new catalog.
        """
        self._file_models = {*(model.name for model in config.models), *held} if by_file else set()
        self._held = frozenset(held)
        self._models = models
        self._catalog = catalog
        self._file = file
        self._settings_of = settings_of
        self._on_want = on_want
        kept = file.read()
        self.config = self._restored(config, kept) if kept is not None else config
        self._loaded = dict(kept.adapters) if kept is not None else {}
        """Adapters that were loaded at run time, by the model's name."""
        self._want()
        if kept is not None:
            models.restore(kept.overrides)

    def _restored(self, config: Config, kept: StoredCatalog) -> Config:
        """Return `config` with the stored models. They replace the models of the file on a local cluster, and are added
        to the models of the file otherwise."""
        stored = [entry for entry in kept.models if entry.get("name") not in self._file_models]
        entries = [entry_of(model) for model in config.models if model.name in self._file_models]
        try:
            return with_models(config, [*entries, *stored], self._held)
        except CallError as error:  # stored by another release, or the file has changed meanwhile
            log.warning("catalog.copy_refused", reason=error.message)
            return config

    def _want(self) -> None:
        settings = self._settings_of(self.config)
        self._models.want(settings, {model.name: self._adapters(model) for model in self.config.models})
        self._on_want(settings)

    def _adapters(self, model: Model) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a model: those of its entry, then those that were loaded at run time."""
        if not model.takes_adapters:
            return ()
        configured = model.adapter_specs()
        names = {adapter.name for adapter in configured}
        return (*configured, *(one for one in self._loaded.get(model.name, ()) if one.name not in names))

    def keep(self) -> None:
        """Store the changed models, the overrides of versions and the loaded adapters. Raises OSError."""
        models = [entry_of(model) for model in self.config.models if model.name not in self._file_models]
        self._file.keep(StoredCatalog(models, self._models.overrides, self._loaded))

    # ---- verbs

    def diff(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> Sequence[Change]:
        """Return the changes and make none, as described in CatalogService."""
        return self._with_entries(entries, prune=prune)[1]

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """Add and change entries and return the changes, as described in CatalogService."""
        config, changes = self._with_entries(entries, prune=prune)
        refused = [change.model for change in changes if change.model in self._file_models]
        if refused:
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{', '.join(refused)}: declared in the controller's file; change the file instead",
                violations=[Violation(f"models[{name}]", "is declared in the controller's file") for name in refused],
            )
        if changes and not validate_only:
            self._adopt(config)
        return changes

    def _with_entries(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> tuple[Config, Sequence[Change]]:
        """Return the configuration with these entries, and its changes. Raises CallError for an invalid entry."""
        before = {model.name: entry_of(model) for model in self.config.models}
        config = with_models(self.config, layers.apply_entries(list(before.values()), entries, prune=prune), self._held)
        after = {model.name: entry_of(model) for model in config.models}
        return config, layers.diff(before, after, self._restarts(config))

    def _adopt(self, config: Config) -> None:
        """Store a new catalog, and set the replica settings of the new catalog in the desired models.

        If the catalog cannot be stored, raises CallError and changes nothing.
        """
        before, loaded = self.config, self._loaded
        self.config = config
        names = {model.name for model in config.models} | self._held
        self._loaded = {name: adapters for name, adapters in loaded.items() if name in names}
        try:
            self.keep()
        except OSError as error:
            self.config, self._loaded = before, loaded
            raise CallError(
                Outcome.INTERNAL, f"the catalog cannot be stored, so nothing has changed: {error}"
            ) from None
        log.info("catalog.applied", models=[model.name for model in config.models])
        self._want()

    def _restarts(self, after: Config) -> Mapping[str, str]:
        """Return the models whose stable version would get new replicas with the configuration `after`, each with the
        reason."""
        old = {variant.spec.name: variant.digest for variant in reversed(self._settings_of(self.config))}
        new = {variant.spec.name: variant.digest for variant in reversed(self._settings_of(after))}
        why = "settings of its replicas change: they are replaced one after another"
        return {name: why for name, digest in new.items() if name in old and old[name] != digest}

    def weigh(self, name: str, version: str, weight: float) -> CatalogEntry:
        """Set the share of the model's calls that a version gets."""
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
        if model.name in self._file_models:
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{model.name}: declared in the controller's file. In the file, replace the model's own keys by those "
                f"of `canary` (including version: {canary}) and remove `canary`",
            )
        entries = [
            layers.promote_canary(entry_of(other)) if other.name == model.name else entry_of(other)
            for other in self.config.models
        ]
        self._adopt(with_models(self.config, entries, self._held))
        return self._preview(model.name)

    def roll_back(self, name: str, reason: str) -> CatalogEntry:
        """Withdraw the canary of a model until the model's entry changes."""
        model, canary = self._with_canary(name)
        return self._override(model.name, canary, gone=f"rolled back: {reason}")

    def quarantine(self, name: str, version: str, reason: str, *, lift: bool) -> CatalogEntry:
        """Stop sending calls to a version, or with `lift` resume sending calls to the version."""
        model = self._named(name)
        versions = [model.version, *([model.canary.version] if model.canary else [])]
        if version not in versions:
            raise invalid("version", f"{version[:64]!r} is no version of {model.name}; it has {', '.join(versions)}")
        entry = self._override(model.name, version, quarantined=not lift)
        log.warning("version.quarantined", model=model.name, version=version, lifted=lift, reason=reason)
        return entry

    def load_adapter(self, name: str, adapter: AdapterSpec) -> tuple[str, AdapterSpec]:
        """Add an adapter to a model, as described in CatalogService."""
        model = self._named(name)
        if not model.takes_adapters:
            raise invalid(
                "name",
                f"{model.name} takes no adapters: add `adapters: []` to its entry, which replaces its replicas once",
            )
        self._check_not_configured(model, adapter.name)
        adapter = self._checked(model, adapter)
        others = [one for one in self._loaded.get(model.name, ()) if one.name != adapter.name]
        self._set_loaded(model.name, (*others, adapter))
        log.info("adapter.loaded", model=model.name, adapter=adapter.name, source=adapter.source)
        return model.name, adapter

    def unload_adapter(self, name: str, adapter: str) -> tuple[str, AdapterSpec]:
        """Remove an adapter, as described in CatalogService."""
        model = self._named(name)
        self._check_not_configured(model, adapter)
        loaded = self._loaded.get(model.name, ())
        found = next((one for one in loaded if one.name == adapter), None)
        if found is None:
            names = ", ".join(one.name for one in loaded) or "none"
            raise CallError(
                Outcome.NOT_FOUND, f"{model.name} has no adapter {adapter[:64]!r} that was loaded; there are {names}"
            )
        self._set_loaded(model.name, tuple(one for one in loaded if one is not found))
        log.info("adapter.unloaded", model=model.name, adapter=adapter)
        return model.name, found

    def _check_not_configured(self, model: Model, adapter: str) -> None:
        if any(one.name == adapter for one in model.adapter_specs()):
            where = "controller's file" if model.name in self._file_models else "model's entry, which `apply` changes"
            raise CallError(
                Outcome.MANAGED_BY_FILE, f"{model.name}:{adapter} is declared in the {where}; change it there"
            )

    def _checked(self, model: Model, adapter: AdapterSpec) -> AdapterSpec:
        """Check an adapter by the rules of the configuration, together with the model's other adapters. Raises
        CallError."""
        others = [one for one in self._adapters(model) if one.name != adapter.name]
        entries = [
            entry_of(other)
            if other.name != model.name
            else entry_of(other) | {"adapters": [dataclasses.asdict(one) for one in (*others, adapter)]}
            for other in self.config.models
        ]
        try:
            config = with_models(self.config, entries, self._held)
        except CallError as error:
            place = re.compile(rf"^models\[{re.escape(model.name)}\]\.adapters\[{len(others)}\]\.")
            violations = [
                Violation("adapter" if (field := place.sub("", one.field)) == "name" else field, one.description)
                for one in error.violations
            ]
            message = "; ".join(f"{one.field}: {one.description}" for one in violations)
            raise CallError(error.outcome, message, violations=violations) from None
        specs = next(other for other in config.models if other.name == model.name).adapter_specs()
        return specs[-1]

    def _set_loaded(self, model: str, adapters: tuple[AdapterSpec, ...]) -> None:
        """Store the adapters of a model that were loaded at run time, and publish them. If they cannot be stored,
        raises CallError and changes nothing."""
        before = self._loaded
        self._loaded = {name: loaded for name, loaded in {**before, model: adapters}.items() if loaded}
        try:
            self.keep()
        except OSError as error:
            self._loaded = before
            raise CallError(
                Outcome.INTERNAL, f"the catalog cannot be stored, so nothing has changed: {error}"
            ) from None
        self._want()

    def _override(self, model: str, version: str, **fields: Any) -> CatalogEntry:
        """Override fields of a version, and store the overrides. Returns the model's entry as it will be published."""
        self._models.override(model, version, **fields)
        self.keep()
        return self._preview(model)

    def _preview(self, model: str) -> CatalogEntry:
        return self._catalog.preview(self._models.stable(model)[0].spec, self._models.shares(model))

    def _named(self, name: str) -> Model:
        for model in self.config.models:
            if name in (model.name, *model.aliases):
                return model
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {name[:128]!r} is not in the catalog")

    def _with_canary(self, name: str) -> tuple[Model, str]:
        """Return a model and the version of the model's canary. Raises CallError for a model without a canary."""
        model = self._named(name)
        if model.canary is None:
            raise invalid("name", f"{model.name} has no canary: add `canary` to its entry first")
        return model, model.canary.version
