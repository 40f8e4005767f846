"""The linked workers as the scheduling policy and the router see them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, overload
from weakref import WeakKeyDictionary

from cluster.api.types import TOOL_PARSER, CompatibilityKey, EngineRequest
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.fleet import Fleet
from cluster.policy.routing.prefill_times import PrefillTimes
from cluster.policy.routing.rendezvous import hash64
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.scheduling.worker_waits import Need

PREFIX_TOKENS: Final = 256
"""Number of prompt tokens by which the policy consistent_hash chooses a worker."""
AGED: Final = 0.1
"""Routing reads a worker's state again if the worker's slowdown has changed by more than this fraction."""


@dataclass(frozen=True, slots=True)
class _ModelState:
    """The workers of one model as routing sees them, and their learned prefill times."""

    fleet: Fleet
    times: PrefillTimes = field(default_factory=PrefillTimes)


class DirectoryOwner(Protocol):
    """Interface of a gateway that has a directory of models."""

    @property
    def directory(self) -> ModelDirectory:
        """Directory of the models that the gateway knows."""


class ModelFleets:
    """The workers of each model as routing sees them, and their learned prefill times."""

    def __init__(self, owner: DirectoryOwner, settings: RoutingSettings) -> None:
        """`settings`: how workers are picked for new calls."""
        self._owner = owner
        self._settings = settings
        self._models: WeakKeyDictionary[KnownModel, _ModelState] = WeakKeyDictionary()

    def fleet(self, known: KnownModel, now: float) -> Fleet:
        """Update the state of those workers of a model that have changed, and return all workers of the model."""
        state = self._models.get(known)
        if state is None:
            state = self._models[known] = _ModelState(Fleet(self._settings))
            known.changed_workers.update(known.links)
        fleet = state.fleet
        if known.changed_workers or fleet.busy:
            for worker_id in known.changed_workers | fleet.busy:
                link = known.links.get(worker_id)
                if link is None:
                    fleet.remove(worker_id)
                    state.times.forget(worker_id)
                    continue
                for sample in link.slots.pop_prefill_samples():
                    state.times.record(worker_id, *sample)
                fleet.put(_read_candidate(known, link, state.times.slowdown(worker_id, now)))
            known.changed_workers.clear()
        return fleet

    def record_late(self, model: str, worker_id: str, now: float) -> None:
        """Record that a worker is late with a first token."""
        known = self._owner.directory.find(model)
        state = None if known is None else self._models.get(known)
        link = None if known is None else known.links.get(worker_id)
        if state is not None and link is not None:
            state.times.record_unfinished(worker_id, *link.slots.unfinished(now))
            link.mark_changed()

    def record_late_lost(self, model: str, worker_id: str, now: float) -> None:
        """Record that a worker was late with the first token of a sequence, and that another worker answered first."""
        known = self._owner.directory.find(model)
        state = None if known is None else self._models.get(known)
        if known is not None and state is not None:
            state.times.record_unfinished_lost(worker_id, now)
            known.changed_workers.add(worker_id)

    def age(self, now: float) -> None:
        """Mark the workers whose slowdown (relative prefill time) has changed only because time has passed. Routing
        then reads them again. Called once a second."""
        for known, state in self._models.items():
            for worker_id in state.times.known():
                worker = state.fleet.find(worker_id)
                if worker is not None and abs(worker.slowdown / state.times.slowdown(worker_id, now) - 1) > AGED:
                    known.changed_workers.add(worker_id)


class LinkedWorkers:
    """The linked workers of one gateway. Implements policy.scheduling.workers.Workers."""

    def __init__(
        self,
        owner: DirectoryOwner,
        fleets: ModelFleets,
        breakers: Breakers,
        caches: WorkerCaches,
        request_of: Callable[[str], EngineRequest],
        settings: RoutingSettings,
    ) -> None:
        """`request_of`: returns the request of a waiting sequence, given the sequence's key. `settings`: how workers
        are picked for new calls."""
        self._owner = owner
        self._fleets = fleets
        self._breakers = breakers
        self._caches = caches
        self._request_of = request_of
        self._settings = settings

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Pick a worker for a new sequence."""
        known = self._owner.directory.find(call.model)
        if known is None:
            return RoutingDecision(None, "no_worker", ())
        fleet = self._fleets.fleet(known, now)
        if call.cached and (sharing := self._caches.sharing(call.call_id, now)):
            call = replace(call, sharing=sharing)
        if self._settings.policy == "consistent_hash" and not call.affinity:
            call = replace(call, prefix=_prefix_hash(self._request_of(call.call_id)))
        rejecting = self._breakers.rejecting(now)
        if rejecting:
            of_model = f"@{call.model}"  # as in WorkerLink.process
            rejecting = [name.removesuffix(of_model) for name in rejecting if name.endswith(of_model)]
        return fleet.pick(call, rejecting)

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Return all workers of a model as candidates for a sequence. The state of a worker is read when its candidate
        is first accessed. `resumed`: whether the sequence is resumed."""
        known = self._owner.directory.find(model)
        if known is None:
            return ()
        fleet = None if resumed else self._fleets.fleet(known, now)
        return _Candidates(known.links.values(), lambda link: self._candidate(known, link, now, fleet))

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return one worker of a model as candidate for a sequence that must be resumed; None if the worker is not
        linked. `incarnation`: identifies the worker."""
        known = self._owner.directory.find(model)
        if known is None:
            return None
        link = known.by_incarnation.get(incarnation)
        return None if link is None else self._candidate(known, link, now, None)

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int] | None:
        """Return, by worker id, how many leading tokens of a waiting sequence's prompt each worker of a model holds.
        None if this is not known, or if the model has only one worker."""
        known = self._owner.directory.find(model)
        if known is None or len(known.links) < 2:  # nothing to choose
            return None
        return self._caches.cached_tokens(model, key, self._request_of(key))

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return, by worker id, how many leading tokens of a waiting sequence's prompt each worker of a model holds.
        Unlike `cached_tokens`, the method also works for a model with one worker, and returns an empty mapping if
        nothing is known."""
        return self._caches.cached_tokens(model, key, self._request_of(key)) or {}

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Return how many prompt tokens of a new sequence a worker has room for now; 0 if all its sequence slots are
        taken. None if the worker is not linked, or accepts no new sequences, for example while it drains."""
        link = self.link(model, worker_id)
        if link is None or not link.takes_new_requests:
            return None
        free = link.free
        return free.tokens if free.sequences > 0 else 0

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Return whether any worker of a model takes calls for an adapter."""
        known = self._owner.directory.find(model)
        return known is not None and known.adapters.is_ready(adapter)

    def has_version(self, model: str, need: Need) -> bool:
        """Return whether any worker of a model has a version, tokenizer and weights that `need` allows. The adapter and
        the worker's state do not matter."""
        known = self._owner.directory.find(model)
        return known is not None and any(map(need.allows, known.builds))

    def serving(self, model: str, need: Need) -> Iterator[str]:
        """Yield the ids of a model's workers that take calls with a need, with or without room for one now."""
        known = self._owner.directory.find(model)
        if known is None or not any(map(need.allows, known.builds)):
            return
        if need.adapter and not known.adapters.is_ready(need.adapter):
            return
        for worker_id, link in known.links.items():
            takes_calls = known.takes_calls(link) or (need.has_begun and known.may_finish_calls(link))
            if (
                takes_calls
                and need.allows(link.build)
                and (not need.adapter or need.adapter in known.adapters.keys_on(link)[0])
            ):
                yield worker_id

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Return whether a worker runs a suspect sequence (one that may have crashed its earlier workers) to which it
        has not added a token yet."""
        known = self._owner.directory.find(model)
        link = None if known is None else known.by_incarnation.get(incarnation)
        return link is not None and any(isinstance(sink, LinkedSequence) and sink.suspect for sink in link.slots.sinks)

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return whether a sequence with this compatibility key can no longer resume, because the workers that are
        compatible with the key were retired and have left. See KnownModel.is_replaced."""
        known = self._owner.directory.find(model)
        return known is not None and known.is_replaced(compatibility)

    def link(self, model: str, worker_id: str) -> WorkerLink | None:
        """Return the link of a worker; None if the worker is not linked."""
        known = self._owner.directory.find(model)
        return None if known is None else known.links.get(worker_id)

    def count(self, model: str) -> int:
        """Return the number of a model's linked workers."""
        known = self._owner.directory.find(model)
        return 0 if known is None else len(known.links)

    def links(self, model: str) -> Sequence[WorkerLink]:
        """Return the links to a model's workers, ordered by worker id."""
        known = self._owner.directory.find(model)
        return [] if known is None else [known.links[worker] for worker in sorted(known.links)]

    def _candidate(self, known: KnownModel, link: WorkerLink, now: float, fleet: Fleet | None) -> Candidate:
        """Return the present state of a worker, including its circuit breaker. `fleet`: the model's workers, which know
        the worker's slowdown. None if the candidate is for a resumed sequence, for which the slowdown stays 1."""
        row = None if fleet is None else fleet.find(link.identity.worker_id)
        healthy = self._breakers.allows(link.process, now)
        return _read_candidate(known, link, 1.0 if row is None else row.slowdown, healthy, fleet is None)


class _Candidates(Sequence[Candidate]):
    """A lazy sequence of candidates: each candidate is computed when it is first accessed. Of a thousand workers, only
    a few are accessed."""

    def __init__(self, links: Iterable[WorkerLink], read: Callable[[WorkerLink], Candidate]) -> None:
        self._links = list(links)
        self._read = read
        self._known: dict[int, Candidate] = {}

    def __len__(self) -> int:
        return len(self._links)

    @overload
    def __getitem__(self, at: int) -> Candidate: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Candidate]: ...
    def __getitem__(self, at: int | slice) -> Candidate | Sequence[Candidate]:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        candidate = self._known.get(at)
        if candidate is None:
            candidate = self._known[at] = self._read(self._links[at])
        return candidate


def _prefix_hash(request: EngineRequest) -> int:
    """Return a hash of the beginning of a prompt, in [0, 2**64). The hash is the same on all gateways."""
    return hash64(f"{request.cache_salt}\0{request.adapter}\0{list(request.prompt_token_ids[:PREFIX_TOKENS])}")


def _read_candidate(
    known: KnownModel, link: WorkerLink, slowdown: float, healthy: bool = True, resumed: bool = False
) -> Candidate:
    """Return the present state of a worker, as routing reads it. `slowdown`: time that the worker needs for a prompt,
    relative to a usual worker of the model. `healthy`: whether the worker's circuit breaker lets sequences through.
    `resumed`: whether the state is for a sequence that must be resumed."""
    free, identity = link.free, link.identity
    adapters, resident = known.adapters.keys_on(link)
    return Candidate(
        worker_id=identity.worker_id,
        model=identity.model,
        build=link.build,
        free_sequences=free.sequences,
        free_tokens=free.tokens,
        running=link.running,
        waiting=link.load.waiting,
        kv_usage=link.load.kv_usage,
        healthy=healthy,
        draining=not link.takes_new_requests,
        incarnation=identity.incarnation,
        compatibility_key=link.compatibility_key,
        resumed_prefill=link.pacing.resumed_tokens,
        new_prefill=link.pacing.new_tokens,
        prefill_budget=link.pacing.budget() if resumed or link.pacing.resumed_tokens else 0,
        prefill_tokens=link.slots.prefill_tokens,
        retired=known.retired(link),
        quarantined=known.versions.is_quarantined(link),
        node=identity.node,
        block_size=link.info.block_size,
        parses_tools=TOOL_PARSER in link.parsers,
        last_sent=link.last_sent,
        unanswered=link.slots.unanswered,
        slots=link.info.max_num_seqs,
        engine_running=link.load.running,
        slowdown=slowdown,
        adapters=adapters,
        resident=resident,
    )
