"""Which models there are: the controller's catalog and what the workers' Hellos say, under names and aliases.

A gateway that starts before its controller knows the models of its workers; one that starts before its workers knows
the catalog, and keeps the last one on disk for the next start.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import structlog

from cluster.api.outcomes import CallError, Outcome, quoted
from cluster.api.types import CatalogEntry, CompatibilityKey, EngineInfo, ModelState, VersionShare, WorkerIdentity
from cluster.gateway.auth.authenticator import ANYBODY
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.text.tokenizer import TextModel
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.routing.version_split import Versions, choose
from cluster.policy.tenants.identity import Principal
from cluster.process import memory
from cluster.process.private_files import make_missing_folders
from cluster.wire import codec
from cluster.wire.bundle import Bundle

log = structlog.get_logger("directory")
_T = TypeVar("_T")


MOST_OF_A_START = 0.99
"""A start that takes longer than others has not ended yet."""


MOST_REPLACED = 64
"""Generations of a model that are remembered."""

MOST_POLICIES = 1000
"""Of how many different lists of models it is kept what they open."""


class KnownModel:
    """A model as this gateway knows it now."""

    def __init__(self, entry: CatalogEntry, in_catalog: bool) -> None:
        self.entry = entry
        self.in_catalog = in_catalog
        self.links: dict[str, WorkerLink] = {}
        self.last: EngineInfo | None = None
        """What the last worker that left had told: it holds while none is linked and the catalog does not say."""
        self._replaced: dict[str, None] = {}
        """Generations that the catalog has called retired, the newest last."""
        self._gone: dict[CompatibilityKey, None] = {}
        """What workers of those were like that have left."""

    @property
    def name(self) -> str:
        """The model's own name."""
        return self.entry.name

    def open_to(self, principal: Principal) -> bool:
        """Whether the caller may use it: its tenant's policy allows one of its names."""
        return any(map(principal.tenant.allows, (self.name, *self.entry.aliases)))

    @property
    def served(self) -> bool:
        """Whether a worker takes its calls."""
        return any(map(self.takes, self.links.values()))

    @property
    def leaving(self) -> bool:
        """Whether it has been taken out of the catalog: what has come is served, nothing more is let in."""
        return self.in_catalog and self.entry.state is ModelState.DRAINING

    def start(self, wall_s: float) -> tuple[float, float]:
        """While nobody serves it: how far its start is, in [0, 1], and how many seconds it takes still, by the time
        that its starts take; (0, 0) where that is not known. `wall_s`: since the epoch."""
        whole_s, since_s = self.entry.cold_start_s, self.entry.starting_since_s
        if whole_s <= 0 or self.entry.state in (ModelState.FAILED, ModelState.GONE):
            return 0.0, 0.0
        passed_s = max(wall_s - since_s, 0.0) if since_s else 0.0
        return min(passed_s / whole_s, MOST_OF_A_START), max(whole_s - passed_s, (1 - MOST_OF_A_START) * whole_s)

    @property
    def state(self) -> ModelState:
        """READY while a worker is linked, else what the catalog says."""
        if self.leaving:
            return ModelState.DRAINING
        if self.served:
            return ModelState.READY
        if self.entry.state is ModelState.READY:  # the catalog is older than the loss of the last worker
            return ModelState.LOADING
        return self.entry.state

    def takes(self, link: WorkerLink) -> bool:
        """Whether a worker gets new calls: it serves, is not being replaced, and its version is not set apart."""
        return link.serves and not self.retired(link)

    def retired(self, link: WorkerLink) -> bool:
        """Whether no call is to begin there, though those that have begun may go on."""
        identity = link.identity
        return (bool(identity.generation) and identity.generation in self.entry.retired) or self.quarantined(link)

    def told(self, entry: CatalogEntry) -> None:
        """The catalog has said this of it."""
        self.entry, self.in_catalog = entry, True
        _remember(self._replaced, *entry.retired)
        for link in self.links.values():
            if link.serves and link.identity.generation not in entry.retired:  # it was taken back
                self._replaced.pop(link.identity.generation, None)

    def came(self, link: WorkerLink) -> None:
        """A worker's link is up."""
        self.links[link.identity.worker_id] = link
        self._gone.pop(link.likeness, None)

    def went(self, link: WorkerLink) -> None:
        """It has ended."""
        del self.links[link.identity.worker_id]
        if link.identity.generation in self._replaced:
            _remember(self._gone, link.likeness)

    def comes_no_more(self, likeness: CompatibilityKey | None) -> bool:
        """Whether no worker like this is there or to come: such ones were replaced by others, which serve."""
        if likeness is None or not self.served or not any(gone.can_continue(likeness) for gone in self._gone):
            return False
        return not any(one.likeness.can_continue(likeness) for one in self.links.values())

    def quarantined(self, link: WorkerLink) -> bool:
        """Whether its version is set apart: what runs there is to go on elsewhere, where it can."""
        share = self.share(link.identity.version)
        return share is not None and share.quarantined

    def share(self, version: str) -> VersionShare | None:
        """A version as the catalog has it."""
        return next((one for one in self.entry.versions if one.version == version), None)

    def choose(self, call_id: str, bundle_digest: str = "") -> Versions:
        """The version for a call, and those that may stand in for it where it has no room: they read its prompt alike.
        `bundle_digest`: the tokenizer that it was begun with. Raises CallError."""
        shares = [one for one in self.entry.versions if not one.quarantined]
        if len(shares) == len(self.entry.versions) <= 1:
            return Versions()
        if not shares:
            raise CallError(Outcome.NO_WORKER, f"model {self.name}: every version of it is quarantined")
        ready = {link.identity.version for link in self.links.values() if self.takes(link)}
        could = [one for one in shares if one.version in ready] or shares
        if bundle_digest:
            could = [one for one in could if self.bundle_digest_of(one.version) == bundle_digest] or could
        weights = [(one.version, one.weight) for one in could]
        first = choose(call_id, weights) or could[0].version
        alike = self.bundle_digest_of(first)
        others = [
            one.version
            for one in could
            if one.weight > 0 and one.version != first and self.bundle_digest_of(one.version) == alike
        ]
        return Versions(first, frozenset((first, *others)))

    def _one_of(self, version: str) -> WorkerLink | None:
        """One of a version's workers, of any where that is not named; rather one that gets new calls."""
        other = None
        for link in self.links.values():
            if version in ("", link.identity.version):
                if self.takes(link):
                    return link
                other = other or link
        return other

    @property
    def max_model_len(self) -> int:
        """Tokens of context; the smallest over the workers, so that a call fits whichever it meets. 0: unknown.
        A worker that does not tell hides nothing of what others do."""
        lengths = [told for link in self.links.values() if (told := link.info.max_model_len)]
        if lengths:
            return min(lengths)
        return self.entry.max_model_len or (self.last.max_model_len if self.last is not None else 0)

    @property
    def bundle_digest(self) -> str:
        """The tokenizer's digest; empty while unknown."""
        return self.bundle_digest_of("")

    def bundle_digest_of(self, version: str) -> str:
        """The digest of a version's tokenizer; empty while unknown."""
        link = self._one_of(version)
        if link is not None:
            return link.identity.bundle_digest
        share = self.share(version)
        return share.bundle_digest if share is not None and share.bundle_digest else self.entry.bundle_digest

    def default_sampling_of(self, version: str = "") -> Mapping[str, object]:
        """The generation config's sampling defaults."""
        link = self._one_of(version)
        if link is not None:
            return link.info.default_sampling
        if not self.entry.default_sampling and self.last is not None:
            return self.last.default_sampling
        return self.entry.default_sampling


def _remember(past: dict[_T, None], *news: _T) -> None:
    """Put them last, and forget the oldest where there are too many."""
    for one in news:
        past.pop(one, None)
        past[one] = None
    for oldest in list(past)[:-MOST_REPLACED]:
        del past[oldest]


class ModelDirectory:
    """Models by name and alias, and their tokenizers by digest (memory, disk, then `fetch`)."""

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[Bundle]]) -> None:
        self._folder = folder
        self._fetch = fetch
        self._models: dict[str, KnownModel] = {}
        self._names: dict[str, str] = {}
        self._visible: dict[tuple[str, ...], Mapping[str, KnownModel]] = {}
        """By a policy's patterns, what those who have it may use, by all its names."""
        self._texts: dict[str, asyncio.Task[TextModel]] = {}
        self._heard = False
        self._catalogued = False
        self._restore()

    # ---- news

    def catalog(self, entries: Sequence[CatalogEntry]) -> None:
        """A new catalog: replaces what the last one said; models of linked workers stay."""
        self._heard = self._catalogued = True
        known = {entry.name: entry for entry in entries}
        for name, model in list(self._models.items()):
            if name not in known:
                if model.links:
                    model.entry, model.in_catalog = replace(model.entry, aliases=()), False
                else:
                    del self._models[name]
        for entry in entries:
            model = self._models.setdefault(entry.name, KnownModel(entry, True))
            model.told(entry)
        self._rename()
        self._keep(entries)

    def joined(self, link: WorkerLink) -> None:
        """A worker's link is up."""
        self._heard = True
        name = link.identity.model
        entry = CatalogEntry(name=name, state=ModelState.READY, bundle_digest=link.identity.bundle_digest)
        model = self._models.setdefault(name, KnownModel(entry, False))
        model.came(link)
        self._rename()
        self._warm(model)

    def left(self, link: WorkerLink) -> None:
        """A worker's link has ended."""
        model = self._models.get(link.identity.model)
        if model is None or model.links.get(link.identity.worker_id) is not link:
            return
        model.went(link)
        if model.links:
            return
        model.last = link.info
        if not model.in_catalog:
            # Without any catalog nobody has said that it is to go: calls wait for a worker that comes back.
            state = ModelState.GONE if self._catalogued else ModelState.LOADING
            model.entry = replace(model.entry, state=state, state_reason="its last worker left")

    def _rename(self) -> None:
        names = {alias: m.name for m in self._models.values() for alias in m.entry.aliases}
        self._names = names | {name: name for name in self._models}
        self._visible = {}

    def refuses(self, identity: WorkerIdentity) -> str:
        """Why a worker may not serve its model: the catalog pins other weights. Empty when it may."""
        known = self._models.get(identity.model)
        if known is None or not known.in_catalog:
            return ""
        about = known.share(identity.version) or known.entry
        if not about.weights_pinned or identity.weight_digest in about.weight_digests:
            return ""
        return f"weight_digest {identity.weight_digest or 'none'} is not what the catalog has for {identity.model}"

    # ---- questions

    @property
    def models(self) -> Sequence[KnownModel]:
        """All models, by name."""
        return [self._models[name] for name in sorted(self._models)]

    def open_to(self, principal: Principal) -> Sequence[KnownModel]:
        """Those that a caller may use, by name."""
        return [model for model in self.models if model.open_to(principal)]

    def aliases(self, model: KnownModel, principal: Principal) -> Sequence[str]:
        """A model's other names for a caller: the catalog's, less those its tenant uses otherwise, and its own."""
        own = principal.model_aliases
        mine = [name for name, target in own.items() if self.find(target) is model]
        return [*(name for name in model.entry.aliases if name not in own), *mine]

    def find(self, name: str) -> KnownModel | None:
        """By name or alias."""
        return self._models.get(self._names.get(name, ""))

    def resolve(self, name: str, principal: Principal = ANYBODY, *, began: bool = False) -> KnownModel:
        """By name or alias, the tenant's own before the catalog's. Raises CallError, which is the same for a model
        that the caller may not use as for one that does not exist; one that leaves is there for calls that `began`."""
        # One look-up for models of others and for none: how long it takes says nothing of what there is.
        model = self._visible_to(principal).get(principal.model_aliases.get(name, name))
        if model is not None:
            if model.leaving and not began:
                raise CallError(Outcome.MODEL_NOT_FOUND, f"model {model.name} is being removed from this cluster")
            return model
        if not self._heard:
            raise CallError(
                Outcome.MODEL_LOADING,
                "this gateway has not heard of any model yet: its controller is not there",
                retry_after_s=2.0,
            )
        if not name:
            raise CallError(Outcome.MODEL_NOT_FOUND, "model: is empty; ListModels names the models that you may use")
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {quoted(name)} does not exist; ListModels names those that do")

    def _visible_to(self, principal: Principal) -> Mapping[str, KnownModel]:
        """What a caller may use, by the catalog's names and aliases."""
        patterns = tuple(principal.tenant.models)
        visible = self._visible.get(patterns)
        if visible is None:
            if len(self._visible) >= MOST_POLICIES:
                self._visible.clear()
            models = {name: self._models[own] for name, own in self._names.items()}
            visible = {name: model for name, model in models.items() if model.open_to(principal)}
            self._visible[patterns] = visible
        return visible

    def starts_in_s(self, name: str) -> float:
        """How much longer than others a call may wait for a model that nobody serves: twice what its start takes."""
        model = self._models.get(name)
        return 0.0 if model is None or model.served else 2 * model.entry.cold_start_s

    def stand_in(self, model: KnownModel, principal: Principal) -> KnownModel | None:
        """The first of a model's fallbacks that has a worker and that the caller may use; None: it has none."""
        for name in model.entry.fallback:
            other = self.find(name)
            if other is not None and other.served and not other.leaving and other.open_to(principal):
                return other
        return None

    async def text(self, model: KnownModel, version: str = "") -> TextModel:
        """A version's tokenizer and chat template. Raises CallError while it cannot be had."""
        digest = model.bundle_digest_of(version)
        if not digest:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared: no tokenizer yet")
        task = self._texts.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._texts[digest] = asyncio.create_task(self._load(digest))
        try:
            return await asyncio.shield(task)
        except LookupError as error:
            raise CallError(Outcome.MODEL_LOADING, f"the tokenizer of {model.name} cannot be had: {error}") from None

    def _warm(self, model: KnownModel) -> None:
        """Fetch a tokenizer before the first call asks for it."""
        digest = model.bundle_digest
        if digest and digest not in self._texts:
            task = self._texts[digest] = asyncio.create_task(self._load(digest))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _load(self, digest: str) -> TextModel:
        folder = self._folder / "bundles" / digest.replace(":", "-")
        if folder.exists():
            bundle = await asyncio.to_thread(Bundle.load, folder)
            if bundle.digest == digest:
                return await _made(bundle)
            log.warning("bundle_damaged", folder=str(folder))
        bundle = await self._fetch(digest)
        text = await _made(bundle)
        await asyncio.to_thread(bundle.save, folder)
        return text

    # ---- the last catalog, on disk

    def _keep(self, entries: Sequence[CatalogEntry]) -> None:
        path = self._folder / "catalog.json"
        make_missing_folders(path.parent)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps([codec.entry_to_pb(entry).SerializeToString().hex() for entry in entries]))
        draft.chmod(0o600)
        draft.replace(path)

    def _restore(self) -> None:
        path = self._folder / "catalog.json"
        try:
            lines = json.loads(path.read_text())
            entries = [codec.entry_from_pb(pb.CatalogModel.FromString(bytes.fromhex(line))) for line in lines]
        except FileNotFoundError:
            return
        except (ValueError, TypeError, OSError) as error:
            log.warning("kept_catalog_unreadable", path=str(path), reason=str(error))
            return
        for entry in entries:
            self._models[entry.name] = KnownModel(replace(entry, replicas=0), True)
        self._heard = self._catalogued = bool(entries)
        self._rename()


async def _made(bundle: Bundle) -> TextModel:
    text = await asyncio.to_thread(TextModel.from_bundle, bundle)
    memory.settle()
    return text
