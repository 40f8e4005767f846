"""The models that a gateway knows, by name and alias. The sources are the controller's catalog and the workers' Hellos.

A gateway that starts before the controller knows the models of its workers. A gateway that starts before its workers
knows the last catalog, which every gateway keeps on disk for its next start.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import structlog

from cluster.api.adapters import SEPARATOR, AdapterSpec, full_name
from cluster.api.outcomes import CallError, Outcome, quoted
from cluster.api.pooling import PoolingInfo, PoolingTask, pooling_tasks
from cluster.api.types import CatalogEntry, CompatibilityKey, EngineInfo, ModelState, VersionShare, WorkerIdentity
from cluster.gateway.adapters import MODEL_STATES, ModelAdapters
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.tokenizer import TextModel
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.routing.version_split import Versions, choose_version
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process import memory
from cluster.process.private_files import make_missing_folders, replace_file
from cluster.wire.bundle import Bundle
from cluster.wire.codecs import codec
from cluster.wire.codecs.adapter_codec import MAX_NAME

log = structlog.get_logger("directory")
_T = TypeVar("_T")


MAX_PROGRESS = 0.99
"""Upper bound of the reported progress of a model's start, used when the start takes longer than expected."""


MAX_REMEMBERED = 64
"""Upper bound, for each model, on the remembered retired generations and on the remembered compatibility keys of
departed workers."""

MAX_POLICIES = 1000
"""Maximum number of distinct pattern lists, from tenants' policies, for which the visible models are cached."""

MAX_LISTS = 64
"""Maximum number of lists of the adapters that a tenant may use that are cached for each model."""


_LITERAL = re.compile(r"[^*?\[]*")
_NO_ADAPTER = AdapterSpec("", "", tenants=("",))
"""Stands for an adapter that does not exist; no tenant may use it."""


class KnownModel:
    """This gateway's knowledge of one model."""

    def __init__(self, entry: CatalogEntry, in_catalog: bool) -> None:
        self.entry = entry
        self.in_catalog = in_catalog
        self.links: dict[str, WorkerLink] = {}
        self.by_incarnation: dict[str, WorkerLink] = {}
        """The same links by the worker's incarnation."""
        self.adapters = ModelAdapters(self.links, self.takes_calls)
        self.adapters.replace(entry.adapters)
        self._open_adapters: dict[tuple[str, tuple[str, ...]], Sequence[AdapterSpec]] = {}
        """The adapters that a tenant may use, by the tenant's name and its policy's model patterns."""
        self.changed_workers: set[str] = set()
        """Ids of the workers that have joined, left or changed since the router has read them."""
        self.parsers: frozenset[str] = frozenset()
        """The kinds of parsers that any linked worker has: TOOL_PARSER, REASONING_PARSER. Kept here because each call
        asks, and a model may have a thousand workers."""
        self._linked_tasks: frozenset[PoolingTask] = frozenset()
        """The pooling tasks of any linked worker, kept here for the same reason."""
        self.last_info: EngineInfo | None = None
        """Engine info of the last worker that left. While no worker is linked, this info is used for fields that the
        catalog lacks."""
        self._replaced: dict[str, None] = {}
        """Deployment generations of workers (WorkerIdentity.generation) that the catalog has retired, oldest first."""
        self._departed: dict[CompatibilityKey, None] = {}
        """Compatibility keys of workers of retired generations that have left, oldest first."""

    @property
    def name(self) -> str:
        """Name of the model in the catalog, not an alias."""
        return self.entry.name

    def open_to(self, principal: Principal) -> bool:
        """Return whether the caller may use the model: the policy of the caller's tenant must allow one of the model's
        names."""
        return any(map(principal.tenant.allows, (self.name, *self.entry.aliases)))

    def adapter_open_to(self, name: str, principal: Principal) -> bool:
        """Return whether there is an adapter with this name that the caller may use: the adapter must not be private to
        other tenants, and the policy of the caller's tenant must allow the model or the adapter (`model:adapter`)."""
        # The same steps for missing and for private adapters, so that timing does not reveal which exist.
        spec, tenant = self.adapters.find(name) or _NO_ADAPTER, principal.tenant
        is_own = not spec.tenants or tenant.name in spec.tenants
        names = (f"{own}{SEPARATOR}{name}" for own in (self.name, *self.entry.aliases))
        return (self.open_to(principal) or any(map(tenant.allows, names))) and is_own

    def adapters_open_to(self, principal: Principal) -> Sequence[AdapterSpec]:
        """Return the adapters that a caller may use, sorted by name. The result is cached, since a model may have a
        thousand adapters and a policy many patterns."""
        key = (principal.tenant.name, tuple(principal.tenant.models))
        found = self._open_adapters.get(key)
        if found is None:
            if len(self._open_adapters) >= MAX_LISTS:
                self._open_adapters.clear()
            found = self._open_adapters[key] = self._find_adapters_open_to(principal.tenant)
        return found

    def _find_adapters_open_to(self, tenant: TenantPolicy) -> Sequence[AdapterSpec]:
        """Return the adapters as `adapters_open_to`. Only patterns that any adapter of the model could match are
        compared with the adapters' names."""
        own = [spec for spec in self.adapters.specs if not spec.tenants or tenant.name in spec.tenants]
        if any(map(tenant.allows, (self.name, *self.entry.aliases))):
            return own
        likely = list(self._likely_patterns(tenant))
        return [spec for spec in own if any(fnmatchcase(start + spec.name, pattern) for start, pattern in likely)]

    def may_have_open_adapters(self, principal: Principal) -> bool:
        """Return whether the policy of the caller's tenant allows the model, or any name of an adapter of it."""
        return self.open_to(principal) or any(True for _ in self._likely_patterns(principal.tenant))

    def _likely_patterns(self, tenant: TenantPolicy) -> Iterator[tuple[str, str]]:
        """Yield the patterns of a policy that a name of an adapter could match, each with that name's begin."""
        for name in (self.name, *self.entry.aliases):
            start = f"{name}{SEPARATOR}"
            yield from ((start, pattern) for pattern in tenant.models if _may_match(pattern, start))

    @property
    def tasks(self) -> frozenset[PoolingTask] | None:
        """Pooling tasks of the model: those of its workers, else of its last worker, else of the catalog. Empty for a
        model that generates; None while no worker has ever reported."""
        if self.links:
            return self._linked_tasks
        if self.last_info is not None:
            return frozenset(pooling_tasks(self.last_info.capabilities))
        return frozenset(self.entry.tasks) if self.entry.tasks or self.entry.engine_class else None

    @property
    def pooling(self) -> PoolingInfo | None:
        """What the model's vectors are, as one of its workers reports; None while that is not known."""
        infos = (link.info for link in self.links.values())
        last = () if self.last_info is None else (self.last_info,)
        return next((info.pooling for info in (*infos, *last) if info.pooling is not None), None)

    @property
    def served(self) -> bool:
        """Whether at least one worker takes new calls for the model."""
        return any(map(self.takes_calls, self.links.values()))

    def serves(self, adapter: str) -> bool:
        """Return whether at least one worker takes new calls for the model, or for one of its adapters by name."""
        return self.served if not adapter else self.adapters.view(adapter).ready > 0

    @property
    def leaving(self) -> bool:
        """Whether the model is being removed from the catalog. Meanwhile accepted calls are served and new calls are
        refused."""
        return self.in_catalog and self.entry.state is ModelState.DRAINING

    def start_progress(self, wall_s: float) -> tuple[float, float]:
        """Return the progress of the model's start in [0, 1] and the remaining seconds, both estimated from earlier
        starts.

        (0, 0) means unknown. The result is meaningful only while no worker serves the model. `wall_s`: the current
        time in seconds since the Unix epoch."""
        whole_s, since_s = self.entry.cold_start_s, self.entry.starting_since_s
        if whole_s <= 0 or self.entry.state in (ModelState.FAILED, ModelState.GONE):
            return 0.0, 0.0
        passed_s = max(wall_s - since_s, 0.0) if since_s else 0.0
        return min(passed_s / whole_s, MAX_PROGRESS), max(whole_s - passed_s, (1 - MAX_PROGRESS) * whole_s)

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
        """Return whether a worker gets new calls: the worker takes new requests, is not retired, and its version is not
        quarantined."""
        return link.takes_new_requests and not self.retired(link)

    def retired(self, link: WorkerLink) -> bool:
        """Return whether a worker must get no new calls, because the catalog has retired its generation or quarantined
        its version. Running calls may continue."""
        generation, retired = link.identity.generation, self.entry.retired
        return (bool(retired) and bool(generation) and generation in retired) or self.quarantined(link)

    def update(self, entry: CatalogEntry) -> None:
        """Apply a new catalog entry."""
        self.entry, self.in_catalog = entry, True
        self._open_adapters.clear()
        self.adapters.replace(entry.adapters)
        self.adapters.refresh()
        self.changed_workers.update(self.links)  # a version may be quarantined, a generation retired
        _remember(self._replaced, *entry.retired)
        for link in self.links.values():
            if (
                link.takes_new_requests and link.identity.generation not in entry.retired
            ):  # the replacement was rolled back
                self._replaced.pop(link.identity.generation, None)

    def add_link(self, link: WorkerLink) -> None:
        """Add the link of a worker that has connected."""
        if (older := self.links.get(link.identity.worker_id)) is not None:
            self.by_incarnation.pop(older.identity.incarnation, None)
        self.links[link.identity.worker_id] = self.by_incarnation[link.identity.incarnation] = link
        link.changes = self.changed_workers
        link.mark_changed()
        self.parsers |= link.parsers
        self._linked_tasks |= link.tasks
        self.adapters.report(link)
        self._departed.pop(link.compatibility_key, None)

    def remove_link(self, link: WorkerLink, gone: ModelState) -> None:
        """Remove a link that has ended. `gone`: new state if this was the last link and the model is in no catalog."""
        del self.links[link.identity.worker_id], self.by_incarnation[link.identity.incarnation]
        link.mark_changed()
        if self.adapters.report(link, is_gone=True):
            self.changed_workers.update(self.links)
        self.parsers = frozenset().union(*(other.parsers for other in self.links.values()))
        self._linked_tasks = frozenset().union(*(other.tasks for other in self.links.values()))
        if link.identity.generation in self._replaced:
            _remember(self._departed, link.compatibility_key)
        if not self.links:
            self.last_info = link.info
            if not self.in_catalog:
                self.entry = replace(self.entry, state=gone, state_reason="its last worker left")

    def leave_catalog(self) -> None:
        """Mark the model as missing from the catalog and drop its aliases. Its workers still serve it by its name."""
        self.entry, self.in_catalog = replace(self.entry, aliases=()), False
        self._open_adapters.clear()

    def is_replaced(self, likeness: CompatibilityKey | None) -> bool:
        """Return whether a sequence with this compatibility key can no longer resume: its compatible workers were
        retired and have left, and only incompatible workers serve the model. False for None."""
        if likeness is None or not self.served or not any(key.can_resume(likeness) for key in self._departed):
            return False
        return not any(link.compatibility_key.can_resume(likeness) for link in self.links.values())

    def quarantined(self, link: WorkerLink) -> bool:
        """Return whether a worker's version is quarantined. The running calls of such a worker move to other workers if
        possible."""
        share = self.share(link.identity.version) if self.entry.versions else None
        return share is not None and share.quarantined

    def share(self, version: str) -> VersionShare | None:
        """Return the catalog's entry for a version; None if the catalog does not have the version."""
        return next((share for share in self.entry.versions if share.version == version), None)

    def choose_version(self, call_id: str, bundle_digest: str = "", only: str = "") -> Versions:
        """Choose a version for a call, and alternatives with the same tokenizer in case the chosen version is full.

        `bundle_digest`: for a resumed call, digest of the tokenizer with which the call began. `only`: the version to
        which the call's adapter belongs, if it belongs to one. Raises CallError."""
        shares = [share for share in self.entry.versions if not share.quarantined]
        if only and any(share.version == only for share in shares):
            return Versions(only, frozenset((only,)))
        if len(shares) == len(self.entry.versions) <= 1:
            return Versions()
        if not shares:
            raise CallError(Outcome.NO_WORKER, f"model {self.name}: every version of it is quarantined")
        ready = {link.identity.version for link in self.links.values() if self.takes_calls(link)}
        usable = [share for share in shares if share.version in ready] or shares
        if bundle_digest:
            usable = [share for share in usable if self.bundle_digest_of(share.version) == bundle_digest] or usable
        weights = [(share.version, share.weight) for share in usable]
        first = choose_version(call_id, weights) or usable[0].version
        digest = self.bundle_digest_of(first)
        others = [
            share.version
            for share in usable
            if share.weight > 0 and share.version != first and self.bundle_digest_of(share.version) == digest
        ]
        return Versions(first, frozenset((first, *others)))

    def _link_of(self, version: str) -> WorkerLink | None:
        """Return the link of a worker of this version, preferably of a worker that gets new calls. A version of ""
        stands for any version."""
        other = None
        for link in self.links.values():
            if version in ("", link.identity.version):
                if self.takes_calls(link):
                    return link
                other = other or link
        return other

    @property
    def max_model_len(self) -> int:
        """Context length of the model in tokens; 0 if unknown. The smallest length of all workers is used, so that a
        call fits every worker.

        Workers that do not report a length are ignored."""
        lengths = [length for link in self.links.values() if (length := link.info.max_model_len)]
        if lengths:
            return min(lengths)
        return self.entry.max_model_len or (self.last_info.max_model_len if self.last_info is not None else 0)

    @property
    def bundle_digest(self) -> str:
        """Digest of the model's tokenizer bundle; "" while unknown."""
        return self.bundle_digest_of("")

    def bundle_digest_of(self, version: str) -> str:
        """Return the digest of a version's tokenizer bundle; "" while unknown."""
        link = self._link_of(version)
        if link is not None:
            return link.identity.bundle_digest
        share = self.share(version)
        return share.bundle_digest if share is not None and share.bundle_digest else self.entry.bundle_digest

    def default_sampling_of(self, version: str = "") -> Mapping[str, object]:
        """Return the sampling defaults of a version, which come from the version's generation config."""
        link = self._link_of(version)
        if link is not None:
            return link.info.default_sampling
        if not self.entry.default_sampling and self.last_info is not None:
            return self.last_info.default_sampling
        return self.entry.default_sampling


def _may_match(pattern: str, start: str) -> bool:
    """Return whether a pattern of a policy could match a name that begins with `start`."""
    literal = _LITERAL.match(pattern)
    begin = literal[0] if literal is not None else ""
    return begin.startswith(start) or start.startswith(begin)


def _remember(past: dict[_T, None], *items: _T) -> None:
    """Append items to `past`, or move known items to its end. Forget the oldest items beyond MAX_REMEMBERED."""
    for item in items:
        past.pop(item, None)
        past[item] = None
    for oldest in list(past)[:-MAX_REMEMBERED]:
        del past[oldest]


@dataclass(frozen=True, slots=True)
class Target:
    """What a caller's model name stands for: a model, or one of its adapters by name."""

    model: KnownModel
    adapter: str = ""

    @property
    def name(self) -> str:
        """Full name of the model or adapter."""
        return full_name(self.model.name, self.adapter)

    @property
    def state(self) -> ModelState:
        """State as callers see it. An adapter is READY while a worker takes its calls."""
        if not self.adapter or self.model.state in (ModelState.DRAINING, ModelState.FAILED, ModelState.GONE):
            return self.model.state
        state = MODEL_STATES[self.model.adapters.view(self.adapter).state]
        return self.model.state if state is ModelState.LOADING and not self.model.served else state

    @property
    def state_reason(self) -> str:
        """Why the model or adapter is in its state; "" for no reason."""
        if not self.adapter:
            return self.model.entry.state_reason
        view = self.model.adapters.view(self.adapter)
        return view.reason if self.model.served or not self.model.entry.state_reason else self.model.entry.state_reason


class ModelDirectory:
    """Directory of the models by name and alias, and of their tokenizers by digest. A tokenizer comes from memory, else
    from disk, else from `fetch`."""

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[Bundle]]) -> None:
        self._folder = folder
        self._fetch = fetch
        self._models: dict[str, KnownModel] = {}
        self._names: dict[str, str] = {}
        self._visible: dict[tuple[str, ...], Mapping[str, KnownModel]] = {}
        """Cache of the models that a tenant policy allows, by name and alias. Its key is the policy's list of model
        patterns."""
        self._reachable: dict[tuple[str, ...], Mapping[str, KnownModel]] = {}
        """Cache of the models of which a tenant policy allows any name of an adapter, like `_visible`."""
        self._texts: dict[str, asyncio.Task[TextModel]] = {}
        self._prompts = PromptMemory()
        revision, entries = _load_catalog(folder)
        for entry in entries:
            self._models[entry.name] = KnownModel(replace(entry, replicas=0), True)
        self._revision = revision
        """Revision of the catalog; 0 if it is unknown."""
        self._any_known = self._has_catalog = bool(self._models)
        """`_any_known`: whether any model has become known so far. `_has_catalog`: whether a catalog has arrived."""
        self._rebuild_names()

    # ---- updates

    def apply_catalog(self, entries: Sequence[CatalogEntry], revision: int = 0) -> None:
        """Replace the previous catalog, and send changed adapters to the workers. Models with a linked worker stay in
        the directory. `revision`: number of the catalog, which grows; without one no adapters are sent."""
        self._revision = revision
        self._any_known = self._has_catalog = True
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
        self._rebuild_names()
        _save_catalog(self._folder, entries, revision)

    def _send_adapters(self, model: KnownModel, link: WorkerLink) -> None:
        if model.in_catalog and self._revision:
            link.send_adapters(self._revision, model.adapters.wanted_on(link))

    def adapters_changed(self, link: WorkerLink) -> None:
        """Take a worker's report of its adapters, or a change of its drain state, into account."""
        model = self._models.get(link.identity.model)
        if model is None or model.links.get(link.identity.worker_id) is not link:
            return
        if model.adapters.report(link):  # the digest that counts is another, on all workers
            model.changed_workers.update(model.links)
        self._send_adapters(model, link)

    def add_link(self, link: WorkerLink) -> None:
        """Add a worker's link. If the worker's model is unknown, add the model too."""
        self._any_known = True
        name = link.identity.model
        entry = CatalogEntry(name=name, state=ModelState.READY, bundle_digest=link.identity.bundle_digest)
        model = self._models.setdefault(name, KnownModel(entry, False))
        model.add_link(link)
        self._send_adapters(model, link)
        self._rebuild_names()
        self._prefetch(model)

    def remove_link(self, link: WorkerLink) -> None:
        """Remove a link that has ended."""
        model = self._models.get(link.identity.model)
        if model is None or model.links.get(link.identity.worker_id) is not link:
            return
        # Without a catalog the model may still be wanted, so calls wait for a worker to return.
        model.remove_link(link, gone=ModelState.GONE if self._has_catalog else ModelState.LOADING)

    def _rebuild_names(self) -> None:
        names = {alias: m.name for m in self._models.values() for alias in m.entry.aliases}
        self._names = names | {name: name for name in self._models}
        self._visible, self._reachable = {}, {}

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return an error text if the catalog pins other weights for the model than the worker has; "" if the worker
        may serve."""
        known = self._models.get(identity.model)
        if known is None or not known.in_catalog:
            return ""
        pinned = known.share(identity.version) or known.entry
        if not pinned.weights_pinned or identity.weight_digest in pinned.weight_digests:
            return ""
        return f"weight_digest {identity.weight_digest or 'none'} is not what the catalog has for {identity.model}"

    # ---- queries

    @property
    def models(self) -> Sequence[KnownModel]:
        """All models, sorted by name."""
        return [self._models[name] for name in sorted(self._models)]

    def open_to(self, principal: Principal) -> Sequence[KnownModel]:
        """Return the models that a caller may use, sorted by name."""
        return [model for model in self.models if model.open_to(principal)]

    def aliases(self, model: KnownModel, principal: Principal) -> Sequence[str]:
        """Return the aliases of a model for a caller: the aliases of the caller's tenant, and the aliases in the
        catalog that the tenant does not redefine."""
        own = principal.model_aliases
        of_tenant = [name for name, target in own.items() if self.find(target) is model]
        return [*(name for name in model.entry.aliases if name not in own), *of_tenant]

    def find(self, name: str) -> KnownModel | None:
        """Return the model with this name or catalog alias; None if no model has the name."""
        return self._models.get(self._names.get(name, ""))

    def resolve(self, name: str, principal: Principal = DEFAULT_PRINCIPAL, *, began: bool = False) -> KnownModel:
        """Return the model with this name or alias, of `model:adapter` the base model. See `target`."""
        return self.target(name, principal, began=began).model

    def target(self, name: str, principal: Principal = DEFAULT_PRINCIPAL, *, began: bool = False) -> Target:
        """Return the model with this name or alias, or the adapter `model:adapter` of such a model. The tenant's
        aliases take precedence over the aliases in the catalog.

        Raises CallError. What is missing and what the caller may not use give equal errors. `began`: whether the call
        began earlier; only such a call gets a model that is being removed."""
        # The same lookup for forbidden and for missing models, so that timing does not reveal which models exist.
        full = principal.model_aliases.get(name, name)
        model, adapter = self._visible_to(principal).get(full), ""
        if model is None and SEPARATOR in full:
            model, adapter = self._adapter(full, principal)
        if model is not None:
            if model.leaving and not began:
                raise CallError(Outcome.MODEL_NOT_FOUND, f"model {model.name} is being removed from this cluster")
            return Target(model, adapter)
        if not self._any_known:
            raise CallError(
                Outcome.MODEL_LOADING,
                "this gateway knows no models yet: neither the controller nor a worker has connected; retry",
                retry_after_s=2.0,
            )
        if not name:
            raise CallError(Outcome.MODEL_NOT_FOUND, "model: is empty; ListModels names the models that you may use")
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {quoted(name)} does not exist; ListModels names those that do")

    def _adapter(self, full: str, principal: Principal) -> tuple[KnownModel | None, str]:
        """Return the model and the adapter of a name `model:adapter`, without a model if the caller may not use it."""
        base, _, adapter = full.rpartition(SEPARATOR)
        adapter = adapter[: MAX_NAME + 1]  # no adapter has a longer name, and patterns are compared with it
        # A model whose adapters no pattern of the caller could match is looked up like one that does not exist.
        model = self._reachable_by(principal).get(principal.model_aliases.get(base, base))
        allowed = model is not None and model.adapter_open_to(adapter, principal)
        return (model, adapter) if allowed else (None, "")

    def adapters_open_to(self, principal: Principal) -> Sequence[Target]:
        """Return the adapters that a caller may use, sorted by model and name."""
        return [Target(model, spec.name) for model in self.models for spec in model.adapters_open_to(principal)]

    def targets_open_to(self, principal: Principal) -> Sequence[Target]:
        """Return the models and the adapters that a caller may use, sorted by their full names."""
        models = [Target(model) for model in self.open_to(principal)]
        return sorted([*models, *self.adapters_open_to(principal)], key=lambda target: target.name)

    def _visible_to(self, principal: Principal) -> Mapping[str, KnownModel]:
        """Return the models that a caller may use, by each model's name and catalog aliases."""
        patterns = tuple(principal.tenant.models)
        visible = self._visible.get(patterns)
        if visible is None:
            if len(self._visible) >= MAX_POLICIES:
                self._visible.clear()
            models = {name: self._models[own] for name, own in self._names.items()}
            visible = {name: model for name, model in models.items() if model.open_to(principal)}
            self._visible[patterns] = visible
        return visible

    def _reachable_by(self, principal: Principal) -> Mapping[str, KnownModel]:
        """Return the models of which a caller may use an adapter, if there is one of the right name, by each model's
        name and catalog aliases."""
        patterns = tuple(principal.tenant.models)
        reachable = self._reachable.get(patterns)
        if reachable is None:
            if len(self._reachable) >= MAX_POLICIES:
                self._reachable.clear()
            models = {name: self._models[own] for name, own in self._names.items()}
            reachable = {name: model for name, model in models.items() if model.may_have_open_adapters(principal)}
            self._reachable[patterns] = reachable
        return reachable

    def starts_in_s(self, name: str) -> float:
        """Return how many seconds longer a call may wait for a model without a worker: twice the expected duration of
        the model's start. 0 if a worker serves the model."""
        model = self._models.get(name)
        return 0.0 if model is None or model.served else 2 * model.entry.cold_start_s

    def fallback_of(
        self,
        model: KnownModel,
        principal: Principal,
        adapter: str = "",
        suits: Callable[[KnownModel], bool] = lambda other: True,
    ) -> KnownModel | None:
        """Return the first of the model's fallbacks that is served, that the caller may use and that `suits` the call;
        None if there is no such fallback. A call for an adapter, else "", needs one of the same name there."""
        for name in model.entry.fallback:
            other = self.find(name)
            if other is None or other.leaving or not suits(other):
                continue
            may_use = other.adapter_open_to(adapter, principal) if adapter else other.open_to(principal)
            if may_use and other.serves(adapter):
                return other
        return None

    async def text_model(self, model: KnownModel, version: str = "") -> TextModel:
        """Return the tokenizer and chat template of a version. Raises CallError while the tokenizer is not
        available."""
        digest = model.bundle_digest_of(version)
        if not digest:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared: no tokenizer yet")
        task = self._texts.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._texts[digest] = asyncio.create_task(self._load(digest))
        try:
            return await asyncio.shield(task)
        except LookupError as error:
            raise CallError(Outcome.MODEL_LOADING, f"cannot fetch the tokenizer of {model.name}: {error}") from None

    def _prefetch(self, model: KnownModel) -> None:
        """Fetch a model's tokenizer now, before the first call needs the tokenizer."""
        digest = model.bundle_digest
        if digest and digest not in self._texts:
            task = self._texts[digest] = asyncio.create_task(self._load(digest))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _load(self, digest: str) -> TextModel:
        folder = self._folder / "bundles" / digest.replace(":", "-")
        if folder.exists():
            bundle = await asyncio.to_thread(Bundle.load, folder)
            if bundle.digest == digest:
                return await self._text_model(bundle)
            log.warning("bundle.damaged", folder=str(folder))
        bundle = await self._fetch(digest)
        text = await self._text_model(bundle)
        await asyncio.to_thread(bundle.save, folder)
        return text

    async def _text_model(self, bundle: Bundle) -> TextModel:
        text = await asyncio.to_thread(TextModel.from_bundle, bundle, memory=self._prompts)
        memory.freeze_objects()
        return text


def _save_catalog(folder: Path, entries: Sequence[CatalogEntry], revision: int) -> None:
    path = folder / "catalog.json"
    make_missing_folders(path.parent)
    models = [codec.entry_to_pb(entry).SerializeToString().hex() for entry in entries]
    replace_file(path, json.dumps({"revision": revision, "models": models}))


def _load_catalog(folder: Path) -> tuple[int, Sequence[CatalogEntry]]:
    """Return the revision and the models of the last catalog; (0, ()) without one."""
    path = folder / "catalog.json"
    try:
        values = json.loads(path.read_text())
        revision, lines = (values["revision"], values["models"]) if isinstance(values, dict) else (0, values)
        return int(revision), [codec.entry_from_pb(pb.CatalogModel.FromString(bytes.fromhex(line))) for line in lines]
    except FileNotFoundError:
        return 0, ()
    except (ValueError, KeyError, TypeError, OSError) as error:
        log.warning("catalog.copy_not_read", path=str(path), reason=str(error))
        return 0, ()
