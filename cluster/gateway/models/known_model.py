"""A gateway's knowledge of a model, from the controller's catalog and from the Hello messages of the model's
workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cluster.api.types import CatalogEntry, CompatibilityKey, ModelState
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.access import ModelAccess
from cluster.gateway.models.adapters import ModelAdapters
from cluster.gateway.models.capabilities import ModelCapabilities
from cluster.gateway.models.retired_generations import RetiredGenerations
from cluster.gateway.models.versions import ModelVersions
from cluster.policy.routing.version_split import Build


class KnownModel:
    """A gateway's knowledge of one model: its catalog entry, its workers, and the state that follows from both."""

    def __init__(self, entry: CatalogEntry, in_catalog: bool) -> None:
        self.entry = entry
        self.in_catalog = in_catalog
        self.links: dict[str, WorkerLink] = {}
        """The links of the model's workers, keyed by worker id."""
        self.by_incarnation: dict[str, WorkerLink] = {}
        """The same links, keyed by the incarnation of the worker."""
        self.builds: Counter[Build] = Counter()
        """Number of workers by their build: version, tokenizer bundle and weights."""
        self.adapters = ModelAdapters(self.links, self.takes_calls, self.may_finish_calls)
        self.adapters.replace(entry.adapters, _all_versions(entry))
        self.access = ModelAccess(entry, self.adapters)
        self.capabilities = ModelCapabilities(entry, self.links)
        self.versions = ModelVersions(entry, self.links, self.builds, self.takes_calls, self.capabilities)
        self.changed_workers: set[str] = set()
        """Ids of the workers that have joined, left or changed since the router has read them."""
        self._retired = RetiredGenerations()

    @property
    def name(self) -> str:
        """Name of the model in the catalog, not an alias."""
        return self.entry.name

    @property
    def served(self) -> bool:
        """Whether at least one worker takes new calls for the model."""
        return any(map(self.takes_calls, self.links.values()))

    def serves(self, adapter: str) -> bool:
        """Return whether at least one worker takes new calls for an adapter. `adapter`: name of the adapter; "" for the
        model itself."""
        return self.served if not adapter else self.adapters.view(adapter).ready > 0

    @property
    def leaving(self) -> bool:
        """Whether the model is being removed from the catalog. In this state, accepted calls are still served and new
        calls are refused."""
        return self.in_catalog and self.entry.state is ModelState.DRAINING

    @property
    def state(self) -> ModelState:
        """State of the model: DRAINING while the model is being removed, READY while a worker takes its calls, else the
        state in the catalog."""
        if self.leaving:
            return ModelState.DRAINING
        if self.served:
            return ModelState.READY
        if self.entry.state is ModelState.READY:  # the catalog is older than the loss of the last worker
            return ModelState.LOADING
        return self.entry.state

    def takes_calls(self, link: WorkerLink) -> bool:
        """Return whether the worker gets new calls. It does if it takes new requests, is not retired, and its version
        is not quarantined."""
        entry = self.entry
        return link.takes_new_requests and not ((entry.retired or entry.versions) and self.retired(link))

    def may_finish_calls(self, link: WorkerLink) -> bool:
        """Return whether the worker may get sequences of calls that have begun on its version, and calls that no other
        worker can serve, even if it is being replaced."""
        return link.takes_new_requests and not self.versions.is_quarantined(link)

    def retired(self, link: WorkerLink) -> bool:
        """Return whether a worker must get no new calls, because the catalog has retired its deployment generation or
        quarantined its version. Running calls may continue."""
        generation, retired = link.identity.generation, self.entry.retired
        return (bool(retired) and bool(generation) and generation in retired) or self.versions.is_quarantined(link)

    def update(self, entry: CatalogEntry) -> None:
        """Apply a new catalog entry."""
        self.in_catalog = True
        self._set_entry(entry)
        self.adapters.replace(entry.adapters, _all_versions(entry))
        self.adapters.refresh()
        self.changed_workers.update(self.links)  # a version may be quarantined, a generation retired
        self._retired.update(entry.retired, self.links.values())

    def _set_entry(self, entry: CatalogEntry) -> None:
        self.entry = entry
        self.access.update(entry)
        self.capabilities.update(entry)
        self.versions.update(entry)

    def add_link(self, link: WorkerLink) -> None:
        """Add the link of a worker that has connected."""
        if (older := self.links.get(link.identity.worker_id)) is not None:
            self.by_incarnation.pop(older.identity.incarnation, None)
            self._count_build(older, -1)
        self.links[link.identity.worker_id] = self.by_incarnation[link.identity.incarnation] = link
        self._count_build(link, 1)
        link.report_changes_to(self.changed_workers)
        self.capabilities.joined(link)
        self.adapters.report(link)
        self._retired.joined(link)

    def remove_link(self, link: WorkerLink, gone: ModelState) -> None:
        """Remove a link that has ended. `gone`: new state of the model if this was its last link and the catalog does
        not have the model."""
        del self.links[link.identity.worker_id]
        if self.by_incarnation.get(link.identity.incarnation) is link:  # another worker may have said the same one
            del self.by_incarnation[link.identity.incarnation]
        self._count_build(link, -1)
        link.mark_changed()
        if self.adapters.report(link, is_gone=True):
            self.changed_workers.update(self.links)
        self.capabilities.left(link)
        self._retired.left(link)
        if not self.links and not self.in_catalog:
            self._set_entry(replace(self.entry, state=gone, state_reason="its last worker left"))

    def _count_build(self, link: WorkerLink, by: int) -> None:
        self.builds[link.build] += by
        if not self.builds[link.build]:
            del self.builds[link.build]

    def leave_catalog(self) -> None:
        """Mark the model as missing from the catalog and drop its aliases. Its workers still serve it by its name."""
        self.in_catalog = False
        self._set_entry(replace(self.entry, aliases=()))

    def is_replaced(self, key: CompatibilityKey | None) -> bool:
        """Return whether a sequence with this compatibility key cannot resume because the compatible workers were
        replaced: they were retired and have left, and only incompatible workers serve the model. False if `key` is
        None."""
        if key is None or not self.served or not self._retired.had_compatible(key):
            return False
        return not any(link.compatibility_key.can_resume(key) for link in self.links.values())


def _all_versions(entry: CatalogEntry) -> tuple[str, ...]:
    """Return the versions of a model; empty if its catalog entry may lack some.

    A controller that has not read the state of Ray yet publishes no versions. For a model that is being removed, it
    publishes one version, although workers of other versions may still serve. A version "" stands for replicas whose
    version the controller does not know.
    """
    versions = tuple(share.version for share in entry.versions)
    return () if entry.state is ModelState.DRAINING or "" in versions else versions
