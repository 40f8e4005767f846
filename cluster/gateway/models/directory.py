"""The models that a gateway knows. The sources are the controller's catalog and the Hello messages of the workers.

A gateway that starts before the controller knows the models of its workers. A gateway that starts before its workers
knows the last catalog, which every gateway keeps on disk for its next start.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, ModelState, WorkerIdentity
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.models.lookup import ModelLookup
from cluster.gateway.models.stored_catalog import StoredCatalog
from cluster.gateway.models.text_models import TextModels
from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle


class ModelDirectory:
    """Directory of a gateway's models and of their tokenizers. `lookup` finds a model by name."""

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[Bundle]]) -> None:
        """`folder`: the gateway's folder, for the catalog and tokenizer bundles. `fetch`: returns a bundle by its
        digest, or raises LookupError."""
        self._stored = StoredCatalog(folder)
        self._texts = TextModels(folder, fetch)
        self._models: dict[str, KnownModel] = {}
        self.lookup = ModelLookup(self._models)
        self.find = self.lookup.find  # without another call, since routing asks for each message of a worker
        revision, entries = self._stored.load()
        for entry in entries:
            self._models[entry.name] = KnownModel(_without_failures(entry), True)
        self._revision = revision
        """Revision of the catalog; 0 if it is unknown."""
        self._has_catalog = bool(self._models)
        """Whether a catalog has arrived, now or before this gateway's start."""
        if self._models:
            self.lookup.rebuild()

    def apply_catalog(self, entries: Sequence[CatalogEntry], revision: int = 0) -> None:
        """Replace the previous catalog, and send changed adapters to the workers. Models with a linked worker stay in
        the directory. `revision`: number of the catalog, higher for a newer catalog; 0: send no adapters."""
        self._revision = revision
        self._has_catalog = True
        known = {entry.name: entry for entry in entries}
        for name, model in list(self._models.items()):
            if name not in known:
                if model.links:
                    model.leave_catalog()
                else:
                    del self._models[name]
        for entry in entries:
            model = self._models.setdefault(entry.name, KnownModel(entry, True))
            model.update(entry)
        for model in self._models.values():
            for link in model.links.values():
                self._send_adapters(model, link)
        self.lookup.rebuild()
        self._stored.save(entries, revision)

    def _send_adapters(self, model: KnownModel, link: WorkerLink) -> None:
        if model.in_catalog and self._revision:
            link.adapters.send(self._revision, model.adapters.wanted_on(link))

    def adapters_changed(self, link: WorkerLink) -> None:
        """Apply a worker's report of its adapters, or a change of its drain state."""
        model = self._models.get(link.identity.model)
        if model is None or model.links.get(link.identity.worker_id) is not link:
            return
        if model.adapters.report(link):  # an adapter now has another digest on all workers
            model.changed_workers.update(model.links)
        self._send_adapters(model, link)

    def add_link(self, link: WorkerLink) -> None:
        """Add a worker's link. If the worker's model is unknown, add the model too."""
        name = link.identity.model
        entry = CatalogEntry(name=name, state=ModelState.READY, bundle_digest=link.identity.bundle_digest)
        model = self._models.setdefault(name, KnownModel(entry, False))
        model.add_link(link)
        self._send_adapters(model, link)
        self.lookup.rebuild()
        if link.identity.bundle_digest:
            self._texts.prefetch(link.identity.bundle_digest)

    def remove_link(self, link: WorkerLink) -> None:
        """Remove a link that has ended."""
        model = self._models.get(link.identity.model)
        if model is None or model.links.get(link.identity.worker_id) is not link:
            return
        # Without a catalog the model may still be wanted, so calls wait for a worker to return.
        model.remove_link(link, gone=ModelState.GONE if self._has_catalog else ModelState.LOADING)

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return an error text if the catalog pins other weights for the model than the worker has; "" if the worker
        may serve."""
        known = self._models.get(identity.model)
        if known is None or not known.in_catalog:
            return ""
        pinned = known.versions.share(identity.version) or known.entry
        if not pinned.weights_pinned or identity.weight_digest in pinned.weight_digests:
            return ""
        return f"weight_digest {identity.weight_digest or 'none'} is not what the catalog has for {identity.model}"

    @property
    def models(self) -> Sequence[KnownModel]:
        """All models, sorted by name."""
        return [self._models[name] for name in sorted(self._models)]

    def starts_in_s(self, name: str) -> float:
        """Return the seconds by which the maximum wait of a call is extended while the model starts: twice the expected
        duration of the start. 0 if a worker serves the model or if the model is unknown."""
        model = self._models.get(name)
        return 0.0 if model is None or model.served else 2 * model.entry.cold_start_s

    async def text_model(self, model: KnownModel, bundle_digest: str = "") -> TextModel:
        """Return a tokenizer and chat template of a model. `bundle_digest`: their bundle; "" for the bundle of any
        version. Raises CallError while the tokenizer is not available."""
        digest = bundle_digest or model.versions.bundle_digest()
        if not digest:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared: no tokenizer yet")
        try:
            return await self._texts.get(digest)
        except LookupError as error:
            raise CallError(Outcome.MODEL_LOADING, f"cannot fetch the tokenizer of {model.name}: {error}") from None


def _without_failures(stored: CatalogEntry) -> CatalogEntry:
    """Return a stored entry as it is before the controller has reported again: a failure of the last run is no reason
    to refuse a call, or to give up a start, of this one."""
    versions = tuple(
        replace(share, replicas=0, state=_not_failed(share.state), state_reason="") for share in stored.versions
    )
    return replace(stored, replicas=0, state=_not_failed(stored.state), state_reason="", versions=versions)


def _not_failed(state: ModelState) -> ModelState:
    return ModelState.DECLARED if state is ModelState.FAILED else state
