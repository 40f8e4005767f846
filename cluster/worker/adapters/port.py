"""The interface to the adapters on a node's disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.api.adapters import AdapterSpec
from cluster.worker.weights.adapter_store import StoredAdapter


class AdapterFiles(Protocol):
    """Interface to the adapters on this node's disk. weights/adapter_store.py implements it."""

    def fetch(self, spec: AdapterSpec, progress: Callable[[], None]) -> StoredAdapter:
        """Fetch an adapter if it is not on this node's disk yet, and check it. Blocks. Calls `progress` when a part has
        arrived. Raises ValueError or OSError."""

    def mark_corrupting(self, digest: str, reason: str) -> None:
        """Record that loading this adapter has corrupted an engine."""
