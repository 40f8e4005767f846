"""New sequences that have left their queue and wait for a worker that can serve them: one that has loaded their
adapter, or one of a version on which they may begin.

Problem: an adapter may be loaded on few workers or on none. A version may have few workers, which are full or paused by
their circuit breakers, or none any more. At the head of its queue, such a sequence would hold back all sequences behind
it, although other workers have room for them.

Method: when its turn comes, such a sequence leaves the queue and waits here. The fair order of tenants counts it as
sent. Once a worker that can serve it has room, the sequences that wait here are sent before those in the queue. Among
sequences with the same need, the tenants take turns.

Invariants: a sequence comes here only if a worker without its adapter, or of another version, has room for it. If no
worker has room, it stays in the queue. A sequence that waits here holds back no sequence of the queue. At most
MAX_PER_MODEL sequences of a model wait here, and at most MAX_PER_TENANT of these belong to one tenant. Beyond these
bounds, a sequence that some workers can serve stays in its queue. If there is no such worker, its call is ended, except
if a part of the call has begun: such sequences wait here in any number, since no further call can begin on a version
without workers. A sequence waits here only once, and no longer than it may wait in a queue.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.routing.router import RouteCall
from cluster.policy.routing.version_split import Build

MAX_PER_MODEL: Final = 1024
MAX_PER_TENANT: Final = 256


@dataclass(frozen=True, slots=True)
class Need:
    """What a worker must have to serve a sequence. `adapter`: the adapter that it must have loaded; "" for none.
    `versions`: the versions of which it must be one; empty for any. `has_begun`: whether a part of the call has begun,
    so that a worker that is being replaced may serve it too. `bundle_digest` and `weight_digest`: its tokenizer bundle
    and its weights; "" for any."""

    adapter: str = ""
    versions: frozenset[str] = frozenset()
    has_begun: bool = False
    bundle_digest: str = ""
    weight_digest: str = ""

    def allows(self, build: Build) -> bool:
        """Return whether workers of a build may serve the sequence, if they have its adapter."""
        return build.is_one_of(self.versions, self.bundle_digest, self.weight_digest)


@dataclass(frozen=True, slots=True)
class WorkerWait:
    """A sequence that waits for a worker. `entry`: the sequence as it waited in the queue. `call`: its routing request.
    `need`: what the worker must have. `since` and `until`: monotonic times in seconds; the wait began at `since` and
    must end at `until`."""

    entry: WaitingSequence
    call: RouteCall
    need: Need
    since: float
    until: float


class WorkerWaits:
    """Sequences of one gateway that wait for workers which can serve them. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._by_key: dict[str, WorkerWait] = {}
        self._by_model: dict[str, dict[Need, dict[str, dict[str, WorkerWait]]]] = {}
        """The sequences that wait, by model, need, tenant and key. The tenant whose turn is next comes first."""
        self._counts: dict[tuple[str, str], int] = {}
        """Number of sequences by model and tenant. The tenant "" has the number of all tenants, without the sequences
        of calls that have begun."""
        self._totals: dict[str, int] = {}
        """Number of sequences by model."""

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return f"WorkerWaits({len(self)} sequences)"

    @property
    def models(self) -> Collection[str]:
        """Names of the models with sequences that wait for a worker."""
        return tuple(self._by_model)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's sequences that wait here, and the sum of their prompt tokens."""
        return self.count(model), sum(wait.entry.tokens for waits in self._tenants(model) for wait in waits.values())

    def count(self, model: str) -> int:
        """Return the number of a model's sequences that wait here."""
        return self._totals.get(model, 0)

    def counts(self, model: str, at_most: int) -> Mapping[Need, int]:
        """Return the number of a model's sequences that wait here, for the next `at_most` needs."""
        of_model = islice(self._by_model.get(model, {}).items(), at_most)
        return {need: sum(map(len, tenants.values())) for need, tenants in of_model}

    def _tenants(self, model: str) -> Iterator[Mapping[str, WorkerWait]]:
        for tenants in self._by_model.get(model, {}).values():
            yield from tenants.values()

    def has_room(self, entry: WaitingSequence) -> bool:
        """Return whether the number of waiting sequences is within the bounds with one more."""
        of_tenant = self._counts.get((entry.model, entry.tenant), 0)
        return self._counts.get((entry.model, ""), 0) < MAX_PER_MODEL and of_tenant < MAX_PER_TENANT

    def add(self, entry: WaitingSequence, call: RouteCall, need: Need, now: float, until: float) -> None:
        """Add a sequence, which may wait until the time `until`."""
        counts, model = self._counts, entry.model
        wait = WorkerWait(entry, call, need, now, until)
        self._by_key[entry.call_id] = wait
        tenants = self._by_model.setdefault(model, {}).setdefault(need, {})
        tenants.setdefault(entry.tenant, {})[entry.call_id] = wait
        self._totals[model] = self.count(model) + 1
        for place in _places(wait):
            counts[place] = counts.get(place, 0) + 1

    def pop(self, key: str) -> WorkerWait | None:
        """Remove a waiting sequence and return its wait; None if the sequence does not wait here. The next turn is that
        of another need, and of another tenant. `key`: the sequence's key."""
        wait = self._by_key.pop(key, None)
        if wait is None:
            return None
        model, of_model = wait.entry.model, self._by_model[wait.entry.model]
        tenants = of_model.pop(wait.need)
        of_tenant = tenants.pop(wait.entry.tenant)
        del of_tenant[key]
        if of_tenant:
            tenants[wait.entry.tenant] = of_tenant
        if tenants:
            of_model[wait.need] = tenants
        if not of_model:
            del self._by_model[model]
        self._totals[model] -= 1
        if not self._totals[model]:
            del self._totals[model]
        for place in _places(wait):
            self._counts[place] -= 1
            if not self._counts[place]:
                del self._counts[place]
        return wait

    def needs(self, model: str) -> Collection[Need]:
        """Return the needs for which sequences of a model wait; the one whose turn is next comes first."""
        return tuple(self._by_model.get(model, ()))

    def in_order(self, model: str, need: Need) -> Iterator[WorkerWait]:
        """Yield the sequences of a model with this need: of each tenant in turn the one that was added first. The
        caller must remove each yielded sequence before it takes the next one; otherwise there is no next one."""
        wait: WorkerWait | None = None
        while (tenants := self._by_model.get(model, {}).get(need)) and (wait is None or wait.entry.call_id not in self):
            wait = next(iter(next(iter(tenants.values())).values()))
            yield wait

    def expired(self, now: float) -> list[WorkerWait]:
        """Return the sequences that have waited too long. They are not removed."""
        return [wait for wait in self._by_key.values() if wait.until <= now]


def _places(wait: WorkerWait) -> Collection[tuple[str, str]]:
    """Return the keys of the numbers in which a sequence counts."""
    entry = wait.entry
    own = (entry.model, entry.tenant)
    return (own,) if wait.need.has_begun else (own, (entry.model, ""))
