"""The catalog of a controller with the operators' changes, which are stored on disk before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import structlog

from cluster.api.adapters import AdapterSpec, full_name
from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.config.adapters import MAX_ADAPTERS, MAX_TENANTS, without_surplus
from cluster.config.document import entry_of, with_models
from cluster.config.model import Model
from cluster.config.schema import Config
from cluster.controller.catalog_overlay import CatalogOverlay, CatalogOverlayFile
from cluster.controller.desired_models import DesiredModels
from cluster.worker.settings import ReplicaSettings

log = structlog.get_logger("catalog")

_MAX_LISTED = 5
"""Number of adapters that an error message names."""


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
        is_whole: bool = True,
        on_want: Callable[[Sequence[ReplicaSettings]], None] = lambda settings: None,
    ) -> None:
        """Restore the stored changes, and set the resulting catalog in `models`.

        `config`: the configuration from the file. `settings_of`: function that returns the replica settings of a
        configuration. `by_file`: whether the models of the file can be changed only in the file. `held`: names of
        models whose entries in the file are invalid. `is_whole`: False if parts of the file are invalid, so that it may
        have models that are neither in `config` nor in `held`; then no stored adapters are dropped. `on_want`: function
        that is called with the replica settings of each new catalog.
        """
        self._file_models = {*(model.name for model in config.models), *held} if by_file else set()
        self._held = frozenset(held)
        self._models = models
        self._file = file
        self._settings_of = settings_of
        self._on_want = on_want
        stored = file.read()
        restored = self._restored(config, stored) if stored is not None else None
        self._config = config if restored is None else restored
        self._loaded = dict(stored.adapters) if stored is not None else {}
        """Adapters that were loaded at run time, by the model's name."""
        self._left_out: Mapping[str, Sequence[str]] = {}
        """Names of the loaded adapters that are not published because their model has too many, by the model's name."""
        self._want()
        if stored is not None:
            models.restore(stored.overrides)
        if restored is not None and is_whole:
            self._drop_removed()

    def _restored(self, config: Config, overlay: CatalogOverlay) -> Config | None:
        """Return `config` with the models that operators have stored (`overlay`).

        The stored models replace the models of `config`. But models that can be changed only in the configuration
        file are kept, and the stored models are added to them. Returns None if the result would be invalid.
        """
        stored = [entry for entry in overlay.models if entry.get("name") not in self._file_models]
        entries = [entry_of(model) for model in config.models if model.name in self._file_models]
        try:
            return with_models(config, [*entries, *stored], self._held)
        except CallError as error:  # stored by another release, or the file has changed meanwhile
            log.warning("catalog.copy_refused", reason=error.message)
            return None

    def _drop_removed(self) -> None:
        """Drop the loaded adapters of models that are neither configured nor held, and store the catalog without them.
        Otherwise these adapters would return with a later model of the same name."""
        names = {model.name for model in self._config.models} | self._held
        removed = {name: adapters for name, adapters in self._loaded.items() if name not in names}
        if not removed:
            return
        self._loaded = {name: adapters for name, adapters in self._loaded.items() if name in names}
        for name, adapters in removed.items():
            log.info("adapter.model_removed", model=name, adapters=[adapter.name for adapter in adapters])
        try:
            self.store()
        except OSError as error:  # the next change stores it, or the next start drops them again
            log.warning("catalog.copy_not_written", reason=str(error))

    def _want(self) -> None:
        """Write the replica settings and the adapters of the catalog to the desired models."""
        settings = self._settings_of(self._config)
        self._models.want(settings, {model.name: self.adapters(model) for model in self._config.models})
        self._on_want(settings)
        self._log_left_out()

    def _log_left_out(self) -> None:
        """Log each model whose loaded adapters are not all published. A model is logged again when the adapters that
        are left out change."""
        before = self._left_out
        self._left_out = {model.name: names for model in self._config.models if (names := self._surplus(model))}
        for name, adapters in self._left_out.items():
            if adapters != before.get(name):
                log.warning("adapter.left_out", model=name, adapters=adapters)

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
        time. Loaded adapters that exceed the limits of a model are left out, because gateways refuse a model with too
        many adapters."""
        if not model.takes_adapters:
            return ()
        configured = model.adapter_specs()
        return (*configured, *without_surplus(configured, self._additional(model)))

    def _additional(self, model: Model) -> Sequence[AdapterSpec]:
        """Return the loaded adapters of a model that takes adapters, without those whose names the model's entry
        has."""
        if not model.takes_adapters:
            return ()
        names = {adapter.name for adapter in model.adapters or ()}
        return [adapter for adapter in self.loaded(model) if adapter.name not in names]

    def _surplus(self, model: Model) -> Sequence[str]:
        """Return the names of the loaded adapters that exceed the limits of a model."""
        published = {adapter.name for adapter in self.adapters(model)}
        return [adapter.name for adapter in self._additional(model) if adapter.name not in published]

    def loaded(self, model: Model) -> tuple[AdapterSpec, ...]:
        """Return the adapters of a model that were loaded at run time."""
        return self._loaded.get(model.name, ())

    def with_entries(self, entries: Sequence[Mapping[str, Any]]) -> Config:
        """Return the current configuration with its models replaced by the models in `entries`. Raises CallError for an
        invalid entry."""
        return with_models(self._config, entries, self._held)

    def check_loaded(self, after: Config) -> None:
        """Check the models of the configuration `after` together with the adapters that were loaded at run time. Raises
        CallError for too many adapters of a model, and for an alias that is also a name of a loaded adapter. A
        conflict that the current configuration has too is allowed, so that it blocks no other change."""
        known = [*self._conflicts(self._config)]
        if violations := [violation for violation in self._conflicts(after) if violation not in known]:
            message = "; ".join(f"{one.field}: {one.description}" for one in violations)
            raise CallError(Outcome.INVALID_FIELD, message, violations=violations)

    def _conflicts(self, config: Config) -> Iterator[Violation]:
        """Yield a violation for each model of `config` that has too many adapters with its loaded ones, and for each
        alias of a model that is also a name of a loaded adapter."""
        adapters = {
            full_name(name, adapter.name): full_name(model.name, adapter.name)
            for model in config.models
            for adapter in self._additional(model)
            for name in (model.name, *model.aliases)
        }
        for model in config.models:
            where = f"models[{model.name}]"
            if surplus := self._surplus(model):
                loaded = self._additional(model)
                count = len(model.adapters or ()) + len(loaded)
                tenants = sum(len(adapter.tenants) for adapter in (*model.adapter_specs(), *loaded))
                listed = ", ".join(surplus[:_MAX_LISTED]) + (", ..." if len(surplus) > _MAX_LISTED else "")
                yield Violation(
                    f"{where}.adapters",
                    f"there would be {count} adapters with {tenants} tenants in all, of which {len(loaded)} adapters "
                    f"were loaded at run time; at most {MAX_ADAPTERS} adapters and {MAX_TENANTS} tenants are allowed: "
                    f"unload {len(surplus)} of the loaded adapters first ({listed})",
                )
            for number, alias in enumerate(model.aliases):  # the name of a model has no colon
                if alias in adapters:
                    yield Violation(
                        f"{where}.aliases[{number}]",
                        f"{alias!r} is also a name of the adapter {adapters[alias]!r}, which was loaded at run time: "
                        "unload the adapter first, or choose another alias",
                    )

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
        removed = {model.name for model in self._config.models} - names
        self._replace(config, {name: adapters for name, adapters in self._loaded.items() if name not in removed})
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
