"""Where operators change the catalog: checked whole, kept on disk, then wanted by the controller.

Who owns an entry: on a Ray of one's own (`headrace up`) the file is the first catalog of the cluster's life, and Apply
may change all of it until the next `up`. On clusters whose controller is given its file by other means (a ConfigMap),
the file's models are the file's: Apply adds others beside them, which are kept here, and refuses to touch those, for
two owners of one entry undo each other's work. Taking a trial back or setting a version apart is allowed in both, since
it must be possible at 3 a.m.; such marks end when the entry is changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import structlog

from cluster.api.catalog import Change
from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CatalogEntry
from cluster.config.schema import Config, Model, entry_of, with_models
from cluster.policy.catalog import layers
from cluster.policy.catalog.versions import VersionMark
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("catalog")


@dataclass(frozen=True, slots=True)
class Kept:
    """What a controller's life has added to the file. `models` are entries; `marks` are by model and version."""

    models: Sequence[Mapping[str, Any]] = ()
    marks: Mapping[str, Mapping[str, VersionMark]] = field(default_factory=dict)


class KeptFile:
    """On disk, for the next controller of the same life: `life` is the instance of a local cluster, else empty."""

    def __init__(self, path: Path, life: str) -> None:
        self._path = path
        self._life = life

    def read(self) -> Kept | None:
        """None where there is nothing of this life, or nothing that can be read."""
        try:
            values = json.loads(self._path.read_text())
            if values["life"] != self._life:
                return None
            marks = {
                model: {version: VersionMark.from_json(mark) for version, mark in versions.items()}
                for model, versions in values["marks"].items()
            }
            return Kept(values["models"], marks)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.warning("kept_catalog_unreadable", path=str(self._path), reason=str(error))
            return None

    def keep(self, kept: Kept) -> None:
        """Write it whole. Raises OSError."""
        marks = {
            model: {version: mark.as_json() for version, mark in versions.items()}
            for model, versions in kept.marks.items()
        }
        text = json.dumps({"life": self._life, "models": [dict(one) for one in kept.models], "marks": marks}, indent=1)
        draft = self._path.with_suffix(".new")
        draft.write_text(text)
        draft.replace(self._path)


class CatalogOwner(Protocol):
    """What the desk needs of the controller (controller.controller.Controller)."""

    marks: dict[str, dict[str, VersionMark]]

    def want(self, settings: Sequence[ReplicaSettings]) -> None:
        """What is to run from now on."""

    def mark(self, model: str, version: str, **fields: Any) -> None:
        """Set aside what the configuration says of a version. Raises KeyError."""

    def preview(self, model: str) -> CatalogEntry:
        """The model as it will be told."""


class StoredCatalogService:
    """api.catalog.CatalogService over a controller."""

    def __init__(
        self,
        config: Config,
        controller: CatalogOwner,
        file: KeptFile,
        settings_of: Callable[[Config], Sequence[ReplicaSettings]],
        *,
        by_file: bool,
        held: Collection[str] = (),
        on_want: Callable[[Sequence[ReplicaSettings]], None] = lambda settings: None,
    ) -> None:
        """`config`: as the file says. `settings_of`: what its models' replicas are started with. `by_file`: the file's
        models are the file's alone. `held`: names of models whose entries in the file are wrong. `on_want` is told of
        settings that are wanted anew."""
        self._file_models = {*(model.name for model in config.models), *held} if by_file else set()
        self._held = frozenset(held)
        self._controller = controller
        self._file = file
        self._settings_of = settings_of
        self._on_want = on_want
        kept = file.read()
        self.config = self._restored(config, kept) if kept is not None else config
        controller.marks = {model: dict(versions) for model, versions in (kept.marks if kept else {}).items()}
        self._want()

    def _restored(self, config: Config, kept: Kept) -> Config:
        """The file's catalog with what was kept: all of it in a local life, else what the file does not have."""
        own = [one for one in kept.models if one.get("name") not in self._file_models]
        entries = [entry_of(model) for model in config.models if model.name in self._file_models]
        try:
            return with_models(config, [*entries, *own], self._held)
        except CallError as error:  # of another release, or the file has changed under it
            log.warning("kept_catalog_refused", reason=error.message)
            return config

    def _want(self) -> None:
        settings = self._settings_of(self.config)
        self._controller.want(settings)
        self._on_want(settings)

    def keep(self) -> None:
        """Write what has been asked; the controller's marks too. Raises OSError."""
        models = [entry_of(one) for one in self.config.models if one.name not in self._file_models]
        self._file.keep(Kept(models, self._controller.marks))

    # ---- verbs

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """See CatalogService."""
        now = {model.name: entry_of(model) for model in self.config.models}
        made = with_models(self.config, layers.applied(list(now.values()), entries, prune=prune), self._held)
        then = {model.name: entry_of(model) for model in made.models}
        changes = layers.changes(now, then, self._restarts(made))
        own = [one.model for one in changes if one.model in self._file_models]
        if own:
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{', '.join(own)}: declared in the controller's file, so changed there and not here",
                violations=[Violation(f"models[{name}]", "is declared in the controller's file") for name in own],
            )
        if changes and not validate_only:
            self._become(made)
        return changes

    def _become(self, config: Config) -> None:
        before, self.config = self.config, config
        try:
            self.keep()
        except OSError as error:
            self.config = before
            raise CallError(Outcome.INTERNAL, f"the catalog cannot be kept, so nothing has changed: {error}") from None
        log.info("catalog.applied", models=[model.name for model in config.models])
        self._want()

    def _restarts(self, then: Config) -> Mapping[str, str]:
        """Models of which what runs is replaced: the version that stays is started with something else."""
        now = {one.spec.name: one.digest for one in reversed(self._settings_of(self.config))}
        new = {one.spec.name: one.digest for one in reversed(self._settings_of(then))}
        why = "its replicas are started with something else: they are replaced one after another"
        return {name: why for name, digest in new.items() if name in now and now[name] != digest}

    def weigh(self, name: str, version: str, weight: float) -> CatalogEntry:
        """See CatalogService."""
        model, trial = self._on_trial(name)
        if version not in (model.version, trial):
            raise invalid("version", f"{version[:64]!r} is no version of {model.name}; it has {model.version}, {trial}")
        part = weight if version == trial else 1.0 - weight
        self._controller.mark(model.name, trial, weight=part, gone="")
        return self._controller.preview(model.name)

    def promote(self, name: str) -> CatalogEntry:
        """See CatalogService."""
        model, trial = self._on_trial(name)
        if model.name in self._file_models:
            raise CallError(
                Outcome.MANAGED_BY_FILE,
                f"{model.name}: declared in the controller's file: there, put the keys of `canary` in the place of the "
                f"model's own, version: {trial} among them, and take `canary` away",
            )
        entries = [
            layers.promoted(entry_of(one)) if one.name == model.name else entry_of(one) for one in self.config.models
        ]
        self._become(with_models(self.config, entries, self._held))
        return self._controller.preview(model.name)

    def roll_back(self, name: str, reason: str) -> CatalogEntry:
        """See CatalogService."""
        model, trial = self._on_trial(name)
        self._controller.mark(model.name, trial, gone=f"rolled back: {reason}")
        return self._controller.preview(model.name)

    def quarantine(self, name: str, version: str, reason: str, *, lift: bool) -> CatalogEntry:
        """See CatalogService."""
        model = self._named(name)
        versions = [model.version, *([model.canary.version] if model.canary else [])]
        if version not in versions:
            there = ", ".join(versions)
            raise invalid("version", f"{version[:64]!r} is no version of {model.name}; there is {there}")
        self._controller.mark(model.name, version, quarantined=not lift)
        log.warning("version.quarantined", model=model.name, version=version, lifted=lift, why=reason)
        return self._controller.preview(model.name)

    def _named(self, name: str) -> Model:
        for model in self.config.models:
            if name in (model.name, *model.aliases):
                return model
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {name[:128]!r} is not in the catalog")

    def _on_trial(self, name: str) -> tuple[Model, str]:
        model = self._named(name)
        if model.canary is None:
            raise invalid("name", f"{model.name} has no version on trial: its entry has no canary")
        return model, model.canary.version
