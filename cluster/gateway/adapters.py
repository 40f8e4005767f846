"""The adapters of one model as a gateway knows them: what the catalog has, and what the workers report.

An adapter is ready on a worker that reports it READY with the adapter's digest. The digest is that of the catalog. If
the catalog has none, it is the first digest that a worker reports as READY, for as long as any worker has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from cluster.api.adapters import SEPARATOR, AdapterSpec, AdapterState
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import ModelState
from cluster.gateway.links.worker_link import WorkerLink

log = structlog.get_logger("directory")

NO_WORKER: Final = "no worker that loads adapters takes calls of the model"
MODEL_STATES: Final = {
    AdapterState.LOADING: ModelState.LOADING,
    AdapterState.READY: ModelState.READY,
    AdapterState.FAILED: ModelState.FAILED,
}


@dataclass(frozen=True, slots=True)
class AdapterView:
    """State of an adapter over the workers that should have it, which are `workers`. `ready` of them take its calls.

    FAILED: no worker could load it. `failures`: (worker id, reason) of the workers where it failed."""

    state: AdapterState
    ready: int = 0
    workers: int = 0
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def reason(self) -> str:
        """Why the adapter is not ready everywhere; "" if no reason is known."""
        if not self.workers:
            return NO_WORKER
        reasons = list(dict.fromkeys(reason for _, reason in self.failures))
        return "; ".join(reasons[:3])


def pending_key(name: str) -> str:
    """Return the name under which routing knows an adapter whose digest is unknown. No digest is like it."""
    return f"{SEPARATOR}{name}"


def name_of(key: str) -> str:
    """Return the name of the adapter in a key of `pending_key`; "" for a digest."""
    return key[1:] if key.startswith(SEPARATOR) else ""


class ModelAdapters:
    """The adapters of one model."""

    def __init__(self, links: Mapping[str, WorkerLink], takes_calls: Callable[[WorkerLink], bool]) -> None:
        """`links`: the model's workers, a mapping that the owner changes. `takes_calls`: see KnownModel."""
        self._links = links
        self._takes_calls = takes_calls
        self._specs: dict[str, AdapterSpec] = {}
        self._digests: dict[str, str] = {}
        """Digests that were learned from workers, by name."""
        self._warned: set[tuple[str, frozenset[str]]] = set()
        self._views: dict[str, AdapterView] = {}

    def __repr__(self) -> str:
        return f"ModelAdapters({', '.join(self._specs) or 'none'})"

    @property
    def specs(self) -> Sequence[AdapterSpec]:
        """The adapters of the catalog, sorted by name."""
        return [self._specs[name] for name in sorted(self._specs)]

    def find(self, name: str) -> AdapterSpec | None:
        """Return the adapter with this name; None if the catalog has none."""
        return self._specs.get(name)

    def replace(self, specs: Iterable[AdapterSpec]) -> None:
        """Apply the adapters of a new catalog."""
        self._specs = {spec.name: spec for spec in specs}
        self._digests = {name: digest for name, digest in self._digests.items() if name in self._specs}
        self.refresh()

    def refresh(self) -> bool:
        """Take changed reports, links and states of workers into account. Returns whether the digest of an adapter has
        changed."""
        self._views, before = {}, dict(self._digests)
        for name, spec in self._specs.items():
            if not spec.digest:
                self._learn(name)
        return self._digests != before

    def _learn(self, name: str) -> None:
        ready = [
            status.digest
            for link in self._links.values()
            if (status := link.adapters.get(name)) is not None and status.state is AdapterState.READY
        ]
        if not ready:
            return
        if self._digests.get(name) not in ready:
            self._digests[name] = ready[0]
        distinct = frozenset(ready)
        if len(distinct) > 1 and (name, distinct) not in self._warned:
            self._warned = {(name, distinct), *list(self._warned)[:64]}
            log.warning("adapter_digests_differ", adapter=name, used=self._digests[name], digests=sorted(distinct))

    def digest(self, name: str) -> str:
        """Return the digest of an adapter; "" while it is unknown."""
        spec = self._specs.get(name)
        return "" if spec is None else spec.digest or self._digests.get(name, "")

    def key(self, name: str) -> str:
        """Return the name under which routing knows an adapter: its digest, or its pending key."""
        return self.digest(name) or pending_key(name)

    def view(self, name: str) -> AdapterView:
        """Return the state of an adapter of the catalog over the workers that take calls. An adapter that the catalog
        no longer has is LOADING on no worker."""
        view = self._views.get(name)
        if view is None:
            spec = self._specs.get(name)
            view = self._views[name] = AdapterView(AdapterState.LOADING) if spec is None else self._view(spec)
        return view

    def _view(self, spec: AdapterSpec) -> AdapterView:
        digest, ready, workers, failed = self.digest(spec.name), 0, 0, 0
        failures: list[tuple[str, str]] = []
        for worker_id in sorted(self._links):
            link = self._links[worker_id]
            if not link.takes_adapters or not self._takes_calls(link) or not _belongs(spec, link):
                continue
            workers += 1
            status = link.adapters.get(spec.name)
            if status is None:
                continue
            if status.state is AdapterState.FAILED:
                failed += 1
                failures.append((worker_id, status.reason or "no reason reported"))
            elif status.state is AdapterState.READY and status.digest == digest:
                ready += 1
            elif status.state is AdapterState.READY:
                failures.append((worker_id, f"it has other files: digest {status.digest}, not {digest}"))
        state = AdapterState.READY if ready else AdapterState.LOADING
        if workers and failed == workers:
            state = AdapterState.FAILED
        return AdapterView(state, ready, workers, tuple(failures))

    def is_ready(self, key: str) -> bool:
        """Return whether any linked worker takes calls for an adapter. `key`: see `key`."""
        if name := name_of(key):
            return name in self._specs and self.view(name).ready > 0
        return any(
            status.digest == key and status.state is AdapterState.READY
            for link in self._links.values()
            for status in link.adapters.values()
        )

    def keys_on(self, link: WorkerLink) -> tuple[frozenset[str], frozenset[str]]:
        """Return the adapters whose calls a worker takes, by all keys under which routing knows them, and those of them
        that lie in a slot of the engine."""
        if not link.adapters:
            return _NONE, _NONE
        ready, resident = set[str](), set[str]()
        for status in link.adapters.values():
            if status.state is not AdapterState.READY:
                continue
            keys = [status.digest]
            if status.digest == self.digest(status.name):
                keys.append(pending_key(status.name))
            ready.update(keys)
            if status.resident:
                resident.update(keys)
        return frozenset(ready), frozenset(resident)

    def wanted_on(self, link: WorkerLink) -> tuple[AdapterSpec, ...]:
        """Return the adapters that a worker should load: those of its version."""
        return tuple(spec for spec in self.specs if _belongs(spec, link))

    def refusal_of(self, model: str, name: str) -> CallError | None:
        """Return the error for calls for an adapter that no worker could load, or that has been removed; None if the
        adapter may be served."""
        if name not in self._specs:
            return CallError(Outcome.MODEL_NOT_FOUND, f"adapter {model}:{name} has been removed")
        view = self.view(name)
        if view.state is not AdapterState.FAILED:
            return None
        return CallError(Outcome.ADAPTER_INVALID, f"adapter {model}:{name} could be loaded on no worker: {view.reason}")


_NONE: Final[frozenset[str]] = frozenset()


def _belongs(spec: AdapterSpec, link: WorkerLink) -> bool:
    return not spec.version or spec.version == link.identity.version
