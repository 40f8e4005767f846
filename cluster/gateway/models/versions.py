"""The versions of one model: their shares in the catalog, and the choice of a version for a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, VersionShare
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.capabilities import ModelCapabilities
from cluster.policy.routing.version_split import Build, Versions, choose_version


class ModelVersions:
    """The versions of one model. The version "" means any version."""

    def __init__(
        self,
        entry: CatalogEntry,
        links: Mapping[str, WorkerLink],
        builds: Mapping[Build, int],
        takes_calls: Callable[[WorkerLink], bool],
        capabilities: ModelCapabilities,
    ) -> None:
        """`links`: the links of the model's workers. `builds`: number of these workers by their build. The owner
        changes both mappings. `takes_calls`: returns whether the worker of a link gets new calls."""
        self._entry = entry
        self._links = links
        self._builds = builds
        self._takes_calls = takes_calls
        self._capabilities = capabilities

    def update(self, entry: CatalogEntry) -> None:
        """Apply a new catalog entry."""
        self._entry = entry

    def share(self, version: str) -> VersionShare | None:
        """Return the catalog's entry for a version; None if the catalog does not have the version."""
        return next((share for share in self._entry.versions if share.version == version), None)

    def is_quarantined(self, link: WorkerLink) -> bool:
        """Return whether a worker's version is quarantined. The running calls of such a worker move to other workers if
        possible."""
        share = self.share(link.identity.version) if self._entry.versions else None
        return share is not None and share.quarantined

    def choose(
        self,
        call_id: str,
        bundle_digest: str = "",
        only: str = "",
        has_adapter: Callable[[WorkerLink], bool] | None = None,
    ) -> Versions:
        """Choose a version and a tokenizer bundle for a call. The result also lists the versions with the same
        tokenizer, which may be used if the chosen version has no capacity left.

        `bundle_digest`: for a resumed call, digest of the tokenizer with which the call began. `only`: the version to
        which the call's adapter belongs; "" if the adapter does not belong to one version. `has_adapter`: returns
        whether a worker has loaded the call's adapter; versions with such workers are preferred. Raises CallError."""
        shares = [share for share in self._entry.versions if not share.quarantined]
        if only and any(share.version == only for share in shares):
            return Versions(
                only, frozenset((only,)), bundle_digest=self._choose_bundle(call_id, only, bundle_digest, has_adapter)
            )
        if len(shares) == len(self._entry.versions) <= 1:
            return Versions(bundle_digest=self._choose_bundle(call_id, "", bundle_digest, has_adapter))
        if not shares:
            raise CallError(Outcome.NO_WORKER, f"model {self._entry.name}: every version of it is quarantined")
        links = [link for link in self._links.values() if self._takes_calls(link)]
        if has_adapter is not None:
            links = list(filter(has_adapter, links)) or links
        ready = {link.identity.version for link in links}
        usable = [share for share in shares if share.version in ready] or shares
        if bundle_digest:
            usable = [share for share in usable if bundle_digest in self._bundles(share.version)] or usable
        weights = [(share.version, share.weight) for share in usable]
        first = choose_version(call_id, weights) or usable[0].version
        digest = self._choose_bundle(call_id, first, bundle_digest, has_adapter)
        others = [
            share.version
            for share in usable
            if share.weight > 0 and share.version != first and digest in self._bundles(share.version)
        ]
        return Versions(first, frozenset((first, *others)), bundle_digest=digest)

    def _bundles(self, version: str) -> Collection[str]:
        """Return the digests of the tokenizer bundles of a version's workers; without workers, that of the catalog."""
        digests = {build.bundle_digest for build in self._builds if version in ("", build.version)}
        return digests or {self.bundle_digest(version)}

    def _choose_bundle(
        self, call_id: str, version: str, begun: str, has_adapter: Callable[[WorkerLink], bool] | None
    ) -> str:
        """Return the digest of a version's tokenizer bundle for a call. If workers that replace others have another
        tokenizer, both bundles get calls, by their number of workers. `begun`: the bundle with which a resumed call
        began. `has_adapter`: see `choose`."""
        digests = self._bundles(version)
        if begun in digests:
            return begun
        if len(digests) == 1:
            return next(iter(digests))
        links = [link for link in self._links.values() if version in ("", link.identity.version)]
        takers = [link for link in links if self._takes_calls(link)]
        if has_adapter is not None:
            takers = list(filter(has_adapter, takers)) or list(filter(has_adapter, links)) or takers
        return choose_version(call_id, Counter(link.identity.bundle_digest for link in takers or links).items())

    def _link_of(self, version: str) -> WorkerLink | None:
        """Return the link of a worker of this version, preferably of a worker that gets new calls."""
        other = None
        for link in self._links.values():
            if version in ("", link.identity.version):
                if self._takes_calls(link):
                    return link
                other = other or link
        return other

    def bundle_digest(self, version: str = "") -> str:
        """Return the digest of a version's tokenizer bundle; "" while unknown."""
        link = self._link_of(version)
        if link is not None:
            return link.identity.bundle_digest
        share = self.share(version)
        return share.bundle_digest if share is not None and share.bundle_digest else self._entry.bundle_digest

    def default_sampling(self, version: str = "") -> Mapping[str, object]:
        """Return the sampling defaults of a version: those of the model's catalog entry, else those of the version's
        generation config."""
        link, last_info = self._link_of(version), self._capabilities.last_info
        if link is not None:
            defaults = link.info.default_sampling
        elif not self._entry.default_sampling and last_info is not None:
            defaults = last_info.default_sampling
        else:
            defaults = self._entry.default_sampling
        return {**defaults, **self._entry.sampling} if self._entry.sampling else defaults
