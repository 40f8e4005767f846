"""The adapters of one model as a gateway knows them: what the catalog lists, and what the workers report.

An adapter is ready on a worker that reports the adapter as READY with the right digest. The right digest is the one in
the catalog. If the catalog has no digest for the adapter, the right digest is the one that most workers report as
READY, and the smallest of several such digests. So gateways that see the same workers choose the same digest. While no
worker is READY, the last digest counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import structlog

from cluster.api.adapters import OTHER_FILES, SEPARATOR, AdapterSpec, AdapterState, AdapterStatus
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import ModelState
from cluster.gateway.links.worker_link import WorkerLink
from cluster.policy.catalog.source_texts import without_places

log = structlog.get_logger("directory")

NO_WORKER: Final = "no worker that loads adapters takes calls of the model"
MAX_WARNED: Final = 64
"""Number of differing digests that are remembered, so that each is logged once."""
MAX_VERSIONS: Final = 16
MODEL_STATES: Final = {
    AdapterState.LOADING: ModelState.LOADING,
    AdapterState.READY: ModelState.READY,
    AdapterState.FAILED: ModelState.FAILED,
}


@dataclass(frozen=True, slots=True)
class AdapterView:
    """State of an adapter over all workers that should have it. FAILED if none of them could load the adapter, or if
    the adapter belongs to a version that the model no longer has. Workers that are being replaced count only if they
    have the adapter and no other worker has it.

    `ready`: number of workers that take the adapter's calls. `workers`: number of workers that should have the adapter.
    `failures`: (worker id, reason) for each worker that could not load the adapter, or has loaded other files.
    `mismatch`: reason why no worker may load the adapter, or "".
    """

    state: AdapterState
    ready: int = 0
    workers: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    mismatch: str = ""

    @property
    def reason(self) -> str:
        """Reason why the adapter is not ready everywhere; "" if no reason is known."""
        if self.mismatch:
            return self.mismatch
        if not self.workers:
            return NO_WORKER
        reasons = list(dict.fromkeys(reason for _, reason in self.failures))
        return "; ".join(reasons[:3])


def pending_key(name: str) -> str:
    """Return the key under which routing knows an adapter whose digest is unknown. It differs from every digest."""
    return f"{SEPARATOR}{name}"


def name_of(key: str) -> str:
    """Return the adapter's name if the key was made by `pending_key`; "" if the key is a digest."""
    return key[1:] if key.startswith(SEPARATOR) else ""


_T = TypeVar("_T")
_Load = tuple[str, int]
"""Digest and load number of an adapter on a worker."""
Keys = tuple[frozenset[str], frozenset[str]]
"""Two sets of adapter keys: the adapters whose calls a worker takes, and the subset that lies in its engine's slots."""


class ModelAdapters:
    """The adapters of one model."""

    def __init__(
        self,
        links: Mapping[str, WorkerLink],
        takes_calls: Callable[[WorkerLink], bool],
        may_finish_calls: Callable[[WorkerLink], bool],
    ) -> None:
        """`links`: the links of the model's workers; the owner changes this mapping. `takes_calls` and
        `may_finish_calls`: return whether the worker of a link gets new calls, and whether it gets calls that no other
        worker can serve (see KnownModel)."""
        self._links = links
        self._takes_calls = takes_calls
        self._may_finish_calls = may_finish_calls
        self._catalog: tuple[AdapterSpec, ...] = ()
        self._versions: tuple[str, ...] = ()
        """The model's versions in the catalog; empty if the catalog does not have all of them."""
        self._specs: dict[str, AdapterSpec] = {}
        self._of_version: dict[str, tuple[AdapterSpec, ...]] = {}
        self._digests: dict[str, str] = {}
        """Digests that were learned from workers, keyed by adapter name."""
        self._reported: dict[str, Mapping[str, _Load]] = {}
        """Digests and load numbers of the adapters that workers have reported as READY, keyed by worker id and then by
        adapter name."""
        self._ready: dict[str, Counter[_Load]] = {}
        """For each adapter name, the number of workers that have reported each digest and load number as READY. A model
        may have a thousand workers and a thousand adapters, so the cost of a report must depend on its own length
        only."""
        self._ready_digests: Counter[str] = Counter()
        self._keys: dict[str, tuple[Mapping[str, AdapterStatus], Keys]] = {}
        """Cached results of `keys_on`, keyed by worker id. Each result is kept with the report from which it was made.
        Routing calls `keys_on` after each message of a worker, and a report may be long."""
        self._warned: set[tuple[str, str]] = set()
        self._views: dict[str, AdapterView] = {}

    def __repr__(self) -> str:
        return f"ModelAdapters({', '.join(self._specs) or 'none'})"

    @property
    def specs(self) -> Iterable[AdapterSpec]:
        """The adapters of the catalog, sorted by name."""
        return self._specs.values()

    def find(self, name: str) -> AdapterSpec | None:
        """Return the adapter with this name; None if the catalog has none."""
        return self._specs.get(name)

    def replace(self, specs: tuple[AdapterSpec, ...], versions: tuple[str, ...] = ()) -> None:
        """Apply the adapters of a new catalog. `versions`: the model's versions in the catalog; empty if the catalog
        does not have all of them."""
        if versions != self._versions:
            self._versions, self._views = versions, {}
        if specs == self._catalog:
            return
        self._catalog, self._of_version = specs, {}
        before = {name: _files(spec) for name, spec in self._specs.items()}
        self._specs = {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}
        same = {name for name, spec in self._specs.items() if before.get(name) == _files(spec)}
        self._digests = {name: digest for name, digest in self._digests.items() if name in same}
        self._learn(self._ready)
        self._views, self._keys = {}, {}

    def refresh(self) -> None:
        """Discard the cached views, because a worker has joined, or has begun or ceased to take calls."""
        self._views = {}

    def report(self, link: WorkerLink, *, is_gone: bool = False) -> bool:
        """Apply a worker's report of its adapters, or the loss of the worker. Returns whether the digest of any adapter
        has changed."""
        worker_id, statuses = link.identity.worker_id, () if is_gone else link.adapters.statuses.values()
        ready = {
            status.name: (status.digest, status.load_number)
            for status in statuses
            if status.state is AdapterState.READY
        }
        before, changed = self._reported.pop(worker_id, {}), set[str]()
        self._keys.pop(worker_id, None)
        if ready:
            self._reported[worker_id] = ready
        for old, new, by in ((before, ready, -1), (ready, before, 1)):
            for name, load in old.items():
                if new.get(name) != load:
                    self._count(name, load, by)
                    changed.add(name)
        self._views = {}
        if not self._learn(changed):
            return False
        self._keys = {}
        return True

    def _count(self, name: str, load: _Load, by: int) -> None:
        _add(self._ready.setdefault(name, Counter()), load, by)
        _add(self._ready_digests, load[0], by)
        if not self._ready[name]:
            del self._ready[name]

    def _learn(self, names: Iterable[str]) -> bool:
        """For each named adapter without a digest in the catalog, choose one of the digests that workers have reported
        for its load. Returns whether any digest has changed."""
        has_changed = False
        for name in names:
            spec, ready = self._specs.get(name), Counter[str]()
            if spec is None or spec.digest:
                continue
            for (digest, number), workers in self._ready.get(name, {}).items():
                if number in (0, spec.load_number):
                    ready[digest] += workers
            if not ready:
                continue
            used = min(ready, key=lambda digest: (-ready[digest], digest))
            if used != self._digests.get(name):
                self._digests[name] = used
                has_changed = True
            for other in ready:
                if other != used and (name, other) not in self._warned:
                    self._warned = {(name, other), *list(self._warned)[:MAX_WARNED]}
                    log.warning("adapter.digests_differ", adapter=name, used=used, other=other)
        return has_changed

    def digest(self, name: str) -> str:
        """Return the digest of an adapter; "" while it is unknown."""
        spec = self._specs.get(name)
        return "" if spec is None else spec.digest or self._digests.get(name, "")

    def key(self, name: str) -> str:
        """Return the key under which routing knows an adapter: its digest, or `pending_key` of its name while the
        digest is unknown."""
        return self.digest(name) or pending_key(name)

    def view(self, name: str) -> AdapterView:
        """Return the state of an adapter over the workers that take calls. An adapter that the catalog no longer has is
        reported as LOADING, without workers."""
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
            if not link.adapters.supported or not self._takes_calls(link) or not _belongs(spec, link):
                continue
            workers += 1
            status = link.adapters.statuses.get(spec.name)
            if status is None:
                continue
            if status.state is AdapterState.READY and status.digest == digest:
                ready += 1
            elif not status.is_of(spec):
                continue
            elif status.state is AdapterState.FAILED:
                failed += 1
                failures.append((worker_id, status.reason or "no reason reported"))
            elif status.state is AdapterState.READY:
                failures.append((worker_id, f"{OTHER_FILES}: digest {status.digest}, not {digest}"))
        if not workers and (mismatch := self._mismatch(spec)):
            return AdapterView(AdapterState.FAILED, mismatch=mismatch)
        if workers and not ready:
            replaced = [link for link in self._links.values() if not self._takes_calls(link)]
            ready = sum(map(self.readiness(spec.name), filter(self._may_finish_calls, replaced)))
            workers += ready
        state = AdapterState.READY if ready else AdapterState.LOADING
        if workers and failed == workers:
            state = AdapterState.FAILED
        return AdapterView(state, ready, workers, tuple(failures))

    def _mismatch(self, spec: AdapterSpec) -> str:
        """Return why no worker may load an adapter: its version is not among those of the model, and no worker of this
        version is left that may serve calls. Return "" otherwise."""
        if not spec.version or not self._versions or spec.version in self._versions:
            return ""
        if any(_belongs(spec, link) and self._may_finish_calls(link) for link in self._links.values()):
            return ""  # until the workers of the next version are ready
        return (
            f"it belongs to version {spec.version}, which the model no longer has: load it for one of "
            f"{', '.join(self._versions)}"
        )

    def is_ready(self, key: str) -> bool:
        """Return whether any linked worker takes calls for an adapter. `key`: the adapter's digest, or the placeholder
        that the method `key` returns while the digest is unknown."""
        name = name_of(key)
        digest = self.digest(name) if name else key
        return digest in ((ready for ready, _ in self._ready.get(name, ())) if name else self._ready_digests)

    def readiness(self, name: str) -> Callable[[WorkerLink], bool]:
        """Return a function that returns whether the worker of a link has loaded an adapter. `name`: the adapter."""
        key = self.key(name)
        return lambda link: key in self.keys_on(link)[0]

    def keys_on(self, link: WorkerLink) -> Keys:
        """Return two sets of adapters: the adapters whose calls the worker takes, and the part of them that lies in
        slots of the worker's engine. Each element is an adapter's digest or its `pending_key`; an adapter may be in a
        set under both."""
        if not link.adapters.statuses:
            return _NONE, _NONE
        worker_id = link.identity.worker_id
        known = self._keys.get(worker_id)
        if known is not None and known[0] is link.adapters.statuses:
            return known[1]
        keys = self._find_keys(link)
        if self._links.get(worker_id) is link:
            self._keys[worker_id] = link.adapters.statuses, keys
        return keys

    def _find_keys(self, link: WorkerLink) -> Keys:
        ready, resident = set[str](), set[str]()
        for status in link.adapters.statuses.values():
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
        """Return the adapters that a worker should load: those of the worker's version, and those that belong to no
        particular version."""
        version = link.identity.version
        wanted = self._of_version.get(version)
        if wanted is None:
            if len(self._of_version) >= MAX_VERSIONS:
                self._of_version.clear()
            wanted = self._of_version[version] = tuple(spec for spec in self.specs if _belongs(spec, link))
        return wanted

    def shown_reason(self, name: str) -> str:
        """Return why an adapter is not ready everywhere, as tenants may see it; "" if no reason is known."""
        view, spec = self.view(name), self._specs.get(name)
        return without_places(view.reason, spec.source) if view.failures and spec is not None else view.reason

    def refusal_of(self, model: str, name: str) -> CallError | None:
        """Return the error for a call that names this adapter. There is an error if the adapter was removed, if no
        worker could load it, or if the model no longer has the adapter's version; otherwise None."""
        if name not in self._specs:
            return CallError(Outcome.MODEL_NOT_FOUND, f"adapter {model}:{name} has been removed")
        if self.view(name).state is not AdapterState.FAILED:
            return None
        reason = self.shown_reason(name)
        return CallError(Outcome.ADAPTER_INVALID, f"adapter {model}:{name} could be loaded on no worker: {reason}")


_NONE: Final[frozenset[str]] = frozenset()


def _files(spec: AdapterSpec) -> tuple[str, str, int]:
    """Return what decides which files an adapter without a digest has."""
    return spec.source, spec.version, spec.load_number


def _add(counter: Counter[_T], key: _T, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]


def _belongs(spec: AdapterSpec, link: WorkerLink) -> bool:
    return not spec.version or spec.version == link.identity.version
