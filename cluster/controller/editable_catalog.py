"""The catalog of a controller with the operators' changes, which are stored on disk before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import structlog

from cluster.api.adapters import AdapterSpec
from cluster.api.outcomes import CallError, Outcome
from cluster.config.document import entry_of, with_models
from cluster.config.model import Model
from cluster.config.schema import Config
from cluster.controller.catalog_overlay import CatalogOverlay, CatalogOverlayFile
from cluster.controller.desired_models import DesiredModels
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("catalog")


class EditableCatalog:
    """The configured models with the operators' changes, and the adapters that were loaded at run time.

    A change is first stored in a file, and then set in the controller's desired models.
    """

    def __init__(
        self,
        config: Config,
        models: DesiredModels,
        file: CatalogOverlayFile,
        settings_of: Callable[[Config], Sequence[ReplicaSettings]],
        *,
        by_file: bool,
        held: Collection[str] = (),
        on_want: Callable[[Sequence[ReplicaSettings]], None] = lambda settings: None,
    ) -> None:
        """Restore the stored changes, and set the resulting catalog in `models`.

        `config`: the configuration from the file. `settings_of`: function that returns the replica settings of a
        configuration. `by_file`: whether the models of the file can be changed only in the file. `held`: names of
        models whose entries in the file are invalid. `on_want`: function that is called with the replica settings of
        each new catalog.
        """
        self._file_models = {*(model.name for model in config.models), *held} if by_file else set()
        self._held = frozenset(held)
        self._models = models
        self._file = file
        self._settings_of = settings_of
        self._on_want = on_want
        stored = file.read()
        self._config = self._restored(config, stored) if stored is not None else config
        self._loaded = dict(stored.adapters) if stored is not None else {}
        """Adapters that were loaded at run time, by the model's name."""
        self._want()
        if stored is not None:
            models.restore(stored.overrides)

    def _restored(self, config: Config, overlay: CatalogOverlay) -> Config:
        """Return `config` with the models that operators have stored (`overlay`).

        The stored models replace the models of `config`. But models that can be changed only in the configuration
        file are kept, and the stored models are added to them. Returns `config` unchanged if the result would be
        invalid.
        """
        stored = [entry for entry in overlay.models if entry.get("name") not in self._file_models]
        entries = [entry_of(model) for model in config.models if model.name in self._file_models]
        try:
            return with_models(config, [*entries, *stored], self._held)
        except CallError as error:  # stored by another release, or the file has changed meanwhile
            log.warning("catalog.copy_refused", reason=error.message)
            return config

    def _want(self) -> None:
        """Write the replica settings and the adapters of the catalog to the desired models."""
        settings = self._settings_of(self._config)
        self._models.want(settings, {model.name: self.adapters(model) for model in self._config.models})
        self._on_want(settings)

    # ---- queries

    @property
    def config(self) -> Config:
        """The configuration with the operators' changes."""
        return self._config

    def is_managed_by_file(self, name: str) -> bool:
        """Return whether a model can be changed only in the controller's configuration file."""
        return name in self._file_models

    def find(self, name: str) -> Model:
        """Return the model with a name or alias. Raises CallError MODEL_NOT_FOUND."""
        for model in self._config.models:
            if name in (model.name, *model.aliases):
                return model
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {name[:128]!r} is not in the catalog")

    def adapters(self, model: Model) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a model: first the adapters of its entry, then the adapters that were loaded at run
        time."""
        if not model.takes_adapters:
            return ()
        configured = model.adapter_specs()
        names = {adapter.name for adapter in configured}
        return (*configured, *(one for one in self.loaded(model) if one.name not in names))

    def loaded(self, model: Model) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a model that were loaded at run time."""
        return self._loaded.get(model.name, ())

    def with_entries(self, entries: Sequence[Mapping[str, Any]]) -> Config:
        """Return the current configuration with its models replaced by the models in `entries`. Raises CallError for an
        invalid entry."""
        return with_models(self._config, entries, self._held)

    def restarts(self, after: Config) -> Mapping[str, str]:
        """Return the models whose stable version would get new replicas under the configuration `after`. The keys are
        model names, the values are reasons."""
        old = {variant.spec.name: variant.digest for variant in reversed(self._settings_of(self._config))}
        new = {variant.spec.name: variant.digest for variant in reversed(self._settings_of(after))}
        why = "settings of its replicas change: they are replaced one after another"
        return {name: why for name, digest in new.items() if name in old and old[name] != digest}

    # ---- changes

    def adopt(self, config: Config) -> None:
        """Replace the configuration by `config`. Raises CallError and changes nothing if `config` cannot be stored."""
        names = {model.name for model in config.models} | self._held
        self._replace(config, {name: adapters for name, adapters in self._loaded.items() if name in names})
        log.info("catalog.applied", models=[model.name for model in config.models])

    def set_loaded(self, model: Model, adapters: tuple[AdapterSpec, ...]) -> None:
        """Replace the adapters that were loaded for a model at run time. Raises CallError and changes nothing if the
        adapters cannot be stored."""
        changed = {**self._loaded, model.name: adapters}
        self._replace(self._config, {name: loaded for name, loaded in changed.items() if loaded})

    def _replace(self, config: Config, loaded: dict[str, tuple[AdapterSpec, ...]]) -> None:
        before = self._config, self._loaded
        self._config, self._loaded = config, loaded
        try:
            self.store()
        except OSError as error:
            self._config, self._loaded = before
            raise CallError(
                Outcome.INTERNAL, f"the catalog cannot be stored, so nothing has changed: {error}"
            ) from None
        self._want()

    def store(self) -> None:
        """Store the changed models, the overrides of versions and the loaded adapters. Raises OSError."""
        models = [entry_of(model) for model in self._config.models if model.name not in self._file_models]
        self._file.keep(CatalogOverlay(models, self._models.overrides, self._loaded))
