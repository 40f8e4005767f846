"""The port for the adapters on a node's disk."""

from __future__ import annotations

from typing import Protocol

from cluster.api.adapters import AdapterSpec
from cluster.worker.weights.adapter_store import StoredAdapter


class AdapterFiles(Protocol):
    """The adapters on this node's disk. weights/adapter_store.py implements it."""

    def fetch(self, spec: AdapterSpec) -> StoredAdapter:
        """Fetch an adapter unless it is on this node's disk, and check it. Blocks. Raises ValueError or OSError."""

    def mark_refused(self, digest: str, reason: str) -> None:
        """Record that the engine failed when it loaded this adapter."""
