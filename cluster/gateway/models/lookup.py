"""Lookup by name of the models and adapters that a caller may use.

Neither the text nor the timing of an error reveals a model that a caller may not use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cluster.api.adapters import SEPARATOR
from cluster.api.outcomes import CallError, Outcome, Violation, quoted
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.models.target import Target
from cluster.policy.tenants.identity import Principal
from cluster.wire.codecs.adapter_codec import MAX_NAME

MAX_POLICIES: Final = 1000
"""Maximum number of distinct pattern lists, from tenants' policies, for which the visible models are cached."""

LISTS: Final = "ListModels, GET /v1/models and `headrace models list`"


class ModelLookup:
    """The names of all models: their own names, and the aliases in the catalog."""

    def __init__(self, models: Mapping[str, KnownModel]) -> None:
        """`models`: the models, keyed by their own names; the owner changes this mapping before it calls `rebuild`."""
        self._models = models
        self._names: dict[str, str] = {}
        """The own name of each model, keyed by this name and by each of the model's aliases in the catalog."""
        self._visible: dict[tuple[str, ...], Mapping[str, KnownModel]] = {}
        """Cache of the models that a tenant policy allows, each under its name and its aliases. The cache is keyed by
        the policy's list of model patterns."""
        self._reachable: dict[tuple[str, ...], Mapping[str, KnownModel]] = {}
        """Cache like `_visible`, of the models that a tenant policy allows or whose adapters it could allow."""
        self._any_known = False
        """Whether a catalog or a model has become known so far."""

    def rebuild(self) -> None:
        """Rebuild the names after a change of the models or of their aliases, and discard the caches."""
        self._any_known = True
        names = {alias: model.name for model in self._models.values() for alias in model.entry.aliases}
        self._names = names | {name: name for name in self._models}
        self._visible, self._reachable = {}, {}

    def find(self, name: str) -> KnownModel | None:
        """Return the model with this name or catalog alias; None if no model has the name."""
        return self._models.get(self._names.get(name, ""))

    def models_of(self, principal: Principal) -> Sequence[KnownModel]:
        """Return the models that a caller may use, sorted by name."""
        return [model for _, model in sorted(self._models.items()) if model.access.allows(principal)]

    def adapters_of(self, principal: Principal) -> Sequence[Target]:
        """Return the adapters that a caller may use, sorted by model and name."""
        models = [model for _, model in sorted(self._models.items())]
        return [Target(model, spec.name) for model in models for spec in model.access.adapters_of(principal)]

    def targets_of(self, principal: Principal) -> Sequence[Target]:
        """Return the models and the adapters that a caller may use, sorted by their full names."""
        models = [Target(model) for model in self.models_of(principal)]
        return sorted([*models, *self.adapters_of(principal)], key=lambda target: target.name)

    def aliases(self, model: KnownModel, principal: Principal) -> Sequence[str]:
        """Return the aliases of a model for a caller: the aliases of the caller's tenant, and the aliases in the
        catalog that the tenant does not redefine."""
        own = principal.model_aliases
        of_tenant = [name for name, target in own.items() if self.find(target) is model]
        return [*(name for name in model.entry.aliases if name not in own), *of_tenant]

    def resolve(self, name: str, principal: Principal = DEFAULT_PRINCIPAL, *, began: bool = False) -> KnownModel:
        """Return the model with this name or alias. For the name of an adapter, return the adapter's base model.
        `began`: whether the call began earlier; only such a call gets a model that is being removed. Raises
        CallError."""
        return self.target(name, principal, began=began).model

    def target(self, name: str, principal: Principal = DEFAULT_PRINCIPAL, *, began: bool = False) -> Target:
        """Return the model with this name or alias, or the adapter `model:adapter` of such a model. The tenant's
        aliases take precedence over the aliases in the catalog.

        Raises CallError. A name that does not exist and a name that the caller may not use give equal errors. `began`:
        whether the call began earlier; only such a call gets a model that is being removed."""
        # The same lookup for forbidden and for missing models, so that timing does not reveal which models exist.
        full = principal.model_aliases.get(name, name)
        model, adapter = self._visible_to(principal).get(full), ""
        if model is None and SEPARATOR in full:
            model, adapter = self._adapter(full, principal)
        if model is not None:
            if model.leaving and not began:
                raise CallError(Outcome.MODEL_NOT_FOUND, f"model {model.name} is being removed from this cluster")
            return Target(model, adapter)
        if not self._any_known:
            raise CallError(
                Outcome.MODEL_LOADING,
                "this gateway knows no models yet: neither the controller nor a worker has connected; retry",
                retry_after_s=2.0,
            )
        if not name:
            message = f"model: is empty; {LISTS} show the models that you may use"
            raise CallError(Outcome.MODEL_NOT_FOUND, message, violations=[Violation("model", "is empty")])
        message = f"model {quoted(name)} does not exist; {LISTS} show the models that you may use"
        raise CallError(Outcome.MODEL_NOT_FOUND, message, violations=[Violation("model", "does not exist")])

    def _adapter(self, full: str, principal: Principal) -> tuple[KnownModel | None, str]:
        """Return the model and the adapter of a name `model:adapter`; (None, "") if the caller may not use the
        adapter."""
        base, _, adapter = full.rpartition(SEPARATOR)
        adapter = adapter[: MAX_NAME + 1]  # no adapter has a longer name, and patterns are compared with it
        # A model whose adapters no pattern of the caller could match is looked up like one that does not exist.
        model = self._reachable_by(principal).get(principal.model_aliases.get(base, base))
        allowed = model is not None and model.access.allows_adapter(adapter, principal)
        return (model, adapter) if allowed else (None, "")

    def _visible_to(self, principal: Principal) -> Mapping[str, KnownModel]:
        """Return the models that a caller may use. Each model is keyed by its name and by its catalog aliases."""
        patterns = tuple(principal.tenant.models)
        visible = self._visible.get(patterns)
        if visible is None:
            if len(self._visible) >= MAX_POLICIES:
                self._visible.clear()
            models = {name: self._models[own] for name, own in self._names.items()}
            visible = {name: model for name, model in models.items() if model.access.allows(principal)}
            self._visible[patterns] = visible
        return visible

    def _reachable_by(self, principal: Principal) -> Mapping[str, KnownModel]:
        """Return every model that the tenant's policy allows. A model is also returned if the policy may allow one of
        its adapters. Each model is keyed by its name and by its catalog aliases."""
        patterns = tuple(principal.tenant.models)
        reachable = self._reachable.get(patterns)
        if reachable is None:
            if len(self._reachable) >= MAX_POLICIES:
                self._reachable.clear()
            models = {name: self._models[own] for name, own in self._names.items()}
            reachable = {name: model for name, model in models.items() if model.access.may_allow_adapters(principal)}
            self._reachable[patterns] = reachable
        return reachable

    def fallback_of(
        self,
        model: KnownModel,
        principal: Principal,
        adapter: str = "",
        suits: Callable[[KnownModel], bool] = lambda other: True,
    ) -> KnownModel | None:
        """Return the first of the model's fallbacks that is served, that the caller may use and for which `suits`
        returns True. None if there is no such fallback. `adapter`: name of the call's adapter, "" for none; the
        fallback must serve an adapter of the same name."""
        for name in model.entry.fallback:
            other = self.find(name)
            if other is None or other.leaving or not suits(other):
                continue
            access = other.access
            may_use = access.allows_adapter(adapter, principal) if adapter else access.allows(principal)
            if may_use and other.serves(adapter):
                return other
        return None
