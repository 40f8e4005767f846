"""What operators see of a catalog's changes, and the desk where they ask for them. For what is asked over the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.api.types import CatalogEntry


@dataclass(frozen=True, slots=True)
class Difference:
    """One key of a model's entry, as a path, with its plain values; None where it is not set."""

    path: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class Change:
    """What is to become of one model. `kind`: add, change or remove. `restarts`: why it gets new replicas, if so."""

    model: str
    kind: str
    differences: tuple[Difference, ...] = ()
    restarts: str = ""


class CatalogService(Protocol):
    """Where operators ask. Names are a model's or its aliases; every verb raises CallError, and then nothing has
    changed."""

    def apply(self, entries: Sequence[Mapping[str, Any]], *, prune: bool, validate_only: bool) -> Sequence[Change]:
        """Make the catalog so; what is different from before."""

    def weigh(self, name: str, version: str, weight: float) -> CatalogEntry:
        """Give a version another part of its model's calls."""

    def promote(self, name: str) -> CatalogEntry:
        """Let the version on trial be the model's own."""

    def roll_back(self, name: str, reason: str) -> CatalogEntry:
        """Take the version on trial back, until its entry is changed."""

    def quarantine(self, name: str, version: str, reason: str, *, lift: bool) -> CatalogEntry:
        """Let a version get no call, or let it get calls again."""
