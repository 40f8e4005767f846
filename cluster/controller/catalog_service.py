"""Operators' changes of the catalog: validated as a whole, stored on disk, then applied by the controller.

On a local cluster (`headrace up`) the configuration file is only the initial catalog: Apply may change every entry, and
the changes hold until the next `up`. On other clusters the file comes from a ConfigMap. There Apply can add models,
which are stored on disk. Apply refuses to change the file's models, since the next ConfigMap would undo the change.
Rolling back a canary and quarantining a version are allowed on every cluster, since an emergency needs them. Both are
overrides of a version, which end when the version's entry changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from cluster.api.catalog import Change
from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CatalogEntry
from cluster.config.schema import Config, Model, entry_of, with_models
from cluster.controller.desired_models import DesiredModels
from cluster.controller.published_catalog import PublishedCatalog
from cluster.policy.catalog import layers
from cluster.policy.catalog.versions import VersionOverride
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("catalog")


@dataclass(frozen=True, slots=True)
class StoredCatalog:
    """Stored changes to the catalog of the configuration file: entries of models, and overrides by model and
    version."""

    models: Sequence[Mapping[str, Any]] = ()
    overrides: Mapping[str, Mapping[str, VersionOverride]] = field(default_factory=dict)


class StoredCatalogFile:
    """File with the stored changes of the catalog. The next controller of the same cluster continues from this file.

    `life`: the instance of a local cluster, else empty. A file of another instance is ignored.
    """

    def __init__(self, path: Path, life: str) -> None:
        self._path = path
        self._life = life

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
            return StoredCatalog(values["models"], overrides)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.warning("kept_catalog_unreadable", path=str(self._path), reason=str(error))
            return None

    def keep(self, kept: StoredCatalog) -> None:
        """Replace the content of the file atomically with `kept`. Raises OSError."""
        overrides = {
            model: {version: override.as_json() for version, override in versions.items()}
            for model, versions in kept.overrides.items()
        }
        text = json.dumps(
            {"life": self._life, "models": [dict(entry) for entry in kept.models], "marks": overrides}, indent=1
        )
        draft = self._path.with_suffix(".new")
        draft.write_text(text)
        draft.replace(self._path)


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
            log.warning("kept_catalog_refused", reason=error.message)
            return config

    def _want(self) -> None:
        settings = self._settings_of(self.config)
        self._models.want(settings)
        self._on_want(settings)

    def keep(self) -> None:
        """Store the changed models and the overrides of versions. Raises OSError."""
        models = [entry_of(model) for model in self.config.models if model.name not in self._file_models]
        self._file.keep(StoredCatalog(models, self._models.overrides))

    # ---- verbs

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """Add and change entries and return the changes, as described in CatalogService."""
        before = {model.name: entry_of(model) for model in self.config.models}
        config = with_models(self.config, layers.apply_entries(list(before.values()), entries, prune=prune), self._held)
        after = {model.name: entry_of(model) for model in config.models}
        changes = layers.diff(before, after, self._restarts(config))
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

    def _adopt(self, config: Config) -> None:
        """Store a new catalog, and set the replica settings of the new catalog in the desired models.

        If the catalog cannot be stored, raises CallError and changes nothing.
        """
        before, self.config = self.config, config
        try:
            self.keep()
        except OSError as error:
            self.config = before
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
        log.warning("version.quarantined", model=model.name, version=version, lifted=lift, why=reason)
        return entry

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
