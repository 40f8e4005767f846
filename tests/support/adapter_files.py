"""Fake of AdapterFiles for test workers, without real files."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

from cluster.api.adapters import AdapterSpec
from cluster.worker.weights.adapter_store import StoredAdapter

WAIT_S = 20.0


def digest_of(source: str) -> str:
    """Return the made-up digest of a source's files."""
    return hashlib.sha256(source.encode()).hexdigest()


class NamedFiles:
    """Fake of AdapterFiles. The digest of an adapter depends only on the name of its source.

    `broken`: maps a source that cannot be fetched to its error. `digests`: maps a source to a digest that
    replaces the usual one. `fetch` waits until `may_fetch` is set.
    """

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self.may_fetch = threading.Event()
        self.may_fetch.set()

    def fetch(self, spec: AdapterSpec, progress: Callable[[], None]) -> StoredAdapter:
        """Implements `AdapterFiles.fetch`."""
        assert self.may_fetch.wait(WAIT_S)
        if spec.source in self.broken:
            raise ValueError(self.broken[spec.source])
        digest = self.digests.get(spec.source) or digest_of(spec.source)
        if spec.digest not in ("", digest):
            raise ValueError(f"digest {digest} is not {spec.digest}")
        return StoredAdapter(digest, Path("/none"))

    def mark_corrupting(self, digest: str, reason: str) -> None:
        """Implements `AdapterFiles.mark_corrupting`."""
