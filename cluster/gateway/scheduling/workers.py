"""The linked workers as the scheduling policy and the router see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cluster.api.types import TOOL_PARSER, CompatibilityKey, EngineRequest
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.router import Candidate


class DirectoryOwner(Protocol):
    """Interface of a gateway that has a directory of models."""

    @property
    def directory(self) -> ModelDirectory:
        """Directory of the models that the gateway knows."""


class LinkedWorkers:
    """The linked workers of one gateway. Implements policy.scheduling.scheduling_policy.Workers."""

    def __init__(
        self,
        owner: DirectoryOwner,
        breakers: Breakers,
        caches: WorkerCaches,
        request_of: Callable[[str], EngineRequest],
    ) -> None:
        """`request_of` returns the request of a waiting sequence by the sequence's key."""
        self._owner = owner
        self._breakers = breakers
        self._caches = caches
        self._request_of = request_of

    def candidates(self, model: str, now: float, resumed: bool) -> list[Candidate]:
        """Return all workers of a model as candidates for a sequence. `resumed`: whether the sequence is resumed."""
        known = self._owner.directory.find(model)
        return [] if known is None else [self._candidate(known, link, now, resumed) for link in known.links.values()]

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return one worker of a model for a sequence that is to be resumed; None if the worker is not linked."""
        known = self._owner.directory.find(model)
        if known is None:
            return None
        link = next((link for link in known.links.values() if link.identity.incarnation == incarnation), None)
        return None if link is None else self._candidate(known, link, now, resumed=True)

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a waiting sequence's prompt the workers of a model hold, by worker id."""
        known = self._owner.directory.find(model)
        if known is None or len(known.links) < 2:  # nothing to choose
            return {}
        return self._caches.cached_tokens(model, key, self._request_of(key))

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return whether a sequence with this key can no longer resume. See KnownModel.is_replaced."""
        known = self._owner.directory.find(model)
        return known is not None and known.is_replaced(compatibility)

    def link(self, model: str, worker_id: str) -> WorkerLink | None:
        """Return the link of a worker; None if the worker is not linked."""
        known = self._owner.directory.find(model)
        return None if known is None else known.links.get(worker_id)

    def has_choice(self, model: str) -> bool:
        """Return whether more than one worker of a model is linked."""
        known = self._owner.directory.find(model)
        return known is not None and len(known.links) > 1

    def links(self, model: str) -> Sequence[WorkerLink]:
        """Return the links to a model's workers, ordered by worker id."""
        known = self._owner.directory.find(model)
        return [] if known is None else [known.links[worker] for worker in sorted(known.links)]

    def _candidate(self, known: KnownModel, link: WorkerLink, now: float, resumed: bool) -> Candidate:
        free, identity = link.free, link.identity
        return Candidate(
            worker_id=identity.worker_id,
            model=identity.model,
            version=identity.version,
            free_sequences=free.sequences,
            free_tokens=free.tokens,
            running=link.running,
            waiting=link.load.waiting,
            kv_usage=link.load.kv_usage,
            healthy=self._breakers.allows(identity.incarnation, now),
            draining=not link.takes_new_requests,
            incarnation=identity.incarnation,
            compatibility_key=link.compatibility_key,
            resumed_prefill=link.pacing.resumed_tokens,
            new_prefill=link.pacing.new_tokens,
            prefill_budget=link.pacing.budget() if resumed or link.pacing.resumed_tokens else 0,
            prefill_tokens=link.prefill_tokens,
            retired=known.retired(link),
            node=identity.node,
            block_size=link.info.block_size,
            parses_tools=TOOL_PARSER in link.parsers,
            last_sent=link.last_sent,
        )
