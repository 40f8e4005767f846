"""Catalog changes in the form that operators see, and the interface of the service that makes catalog changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.api.adapters import AdapterSpec
from cluster.api.types import CatalogEntry


@dataclass(frozen=True, slots=True)
class Difference:
    """A changed key of a model's entry, with its values before and after the change as JSON values.

    `path` is the dotted path of the key. None stands for a key that is not set.
    """

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one model's entry.

    `kind` is "add", "change" or "remove". `restarts`: why the model's replicas restart, or "" if they keep running.
    """

    model: str
    kind: str
    differences: tuple[Difference, ...] = ()
    restarts: str = ""


class CatalogService(Protocol):
    """Service through which operators change the catalog.

    `name` is a model's name or one of the model's aliases. Every method may raise CallError. A method that raises
    CallError has changed nothing.
    """

    def diff(self, entries: Sequence[Mapping[str, Any]], *, prune: bool) -> Sequence[Change]:
        """Return the changes that `entries` would make, including changes that `apply` would refuse to make."""

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """Add or replace these entries and return the changes.

        `prune`: also remove all models that have no entry in `entries`. `validate_only`: only return the changes.
        """

    def weigh(self, name: str, version: str, weight: float) -> CatalogEntry:
        """Set a version's share of the model's calls to `weight`, in [0, 1]."""

    def promote(self, name: str) -> CatalogEntry:
        """Make the canary the model's stable version."""

    def roll_back(self, name: str, reason: str) -> CatalogEntry:
        """Withdraw the canary of a model, until an operator changes the model's entry."""

    def quarantine(self, name: str, version: str, reason: str, *, lift: bool) -> CatalogEntry:
        """Stop sending calls to a version, or with `lift` resume sending calls to the version."""

    def load_adapter(self, name: str, adapter: AdapterSpec) -> tuple[str, AdapterSpec]:
        """Add an adapter to a model, or replace an adapter of the same name that this method has added. Returns the
        model's name and the adapter.

        The adapter does not become part of the model's entry, so `apply` does not remove it. Raises CallError if the
        entry already has an adapter of this name. If the entry later gets an adapter of this name, the entry's adapter
        replaces the added one.
        """

    def unload_adapter(self, name: str, adapter: str) -> tuple[str, AdapterSpec]:
        """Remove an adapter that `load_adapter` has added. Returns the model's name and the adapter."""
