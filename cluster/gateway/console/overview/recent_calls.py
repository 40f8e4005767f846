"""The newest calls that have ended at one gateway process, and sums over all calls that have ended.

Problem: the console shows calls after their end, and rates by tenant and model. Recording an ended call may cost only a
few microseconds, and the calls of one tenant must not push out the calls of all others.

Invariants: at most `max_calls` calls are kept. When one more call ends, the oldest call of the tenant with most calls
is dropped, so a tenant with fewer calls than the others keeps all its calls. A call is kept as one tuple of numbers and
short texts, without any text of a prompt or an answer. The number of tenants and models with sums is bounded. When one
more is added, the oldest is forgotten.

Source: longest queue drop (McKenney, Stochastic Fairness Queueing, 1990).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.pooling.pooling_opening import PoolingOpening
from cluster.gateway.calls.records.token_times import mean_gap_s, new_tokens

MAX_CALLS: Final = 2000
"""Maximum number of ended calls that are kept. Even with the longest ids they take less than 4 MiB."""
MAX_AGE_S: Final = 3600.0
"""Seconds after its end for which a call is kept."""
MAX_TENANTS: Final = 2000
MAX_MODELS: Final = 1000
MAX_CHARS: Final = 128
"""Number of characters that are kept of a request id and of a model's name, which callers choose."""


class EndedCall(NamedTuple):
    """A call that has ended, or that was refused. `number`: serial number of the call in this process. `id`: the id of
    the answer, "" for a refused call. `arrived` and `ended` are monotonic seconds. None means that a value is not known
    or does not exist."""

    number: int
    id: str
    request_id: str
    tenant: str
    model: str
    api: str
    outcome: str
    arrived: float
    ended: float
    queue_s: float | None
    ttft_s: float | None
    tokens: int
    gap_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    worker: str
    reason: str
    resumes: int
    trace_id: str


@dataclass(slots=True)
class CallSums:
    """Sums over the ended calls of a tenant or a model. Refused calls count as requests. `cost`: in the currency of the
    configuration."""

    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0


class FairRing:
    """Ended calls by tenant, at most `max_calls` in all. Every operation takes O(1), except `drop_older`."""

    def __init__(self, max_calls: int = MAX_CALLS) -> None:
        self.max_calls = max_calls
        self._calls: dict[str, deque[EndedCall]] = {}
        self._by_count: dict[int, dict[str, None]] = {}
        """The tenants by their number of calls."""
        self._longest = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[EndedCall]:
        for calls in self._calls.values():
            yield from calls

    def of(self, tenant: str) -> Iterator[EndedCall]:
        """Return the calls of a tenant, oldest first."""
        return iter(self._calls.get(tenant, ()))

    def add(self, call: EndedCall) -> None:
        """Add a call. If there are then too many calls, drop the oldest call of the tenant with most calls."""
        calls = self._calls.get(call.tenant)
        if calls is None:
            calls = self._calls[call.tenant] = deque()
        calls.append(call)
        self._size += 1
        self._move(call.tenant, len(calls) - 1, len(calls))
        if self._size > self.max_calls:
            self._drop(next(iter(self._by_count[self._longest])))

    def drop_older(self, than: float) -> None:
        """Drop the calls that ended before the time `than`."""
        for tenant, calls in list(self._calls.items()):
            while calls and calls[0].ended < than:
                self._drop(tenant)

    def _drop(self, tenant: str) -> None:
        calls = self._calls[tenant]
        calls.popleft()
        self._size -= 1
        self._move(tenant, len(calls) + 1, len(calls))
        if not calls:
            del self._calls[tenant]

    def _move(self, tenant: str, before: int, after: int) -> None:
        if before:
            tenants = self._by_count[before]
            del tenants[tenant]
            if not tenants:
                del self._by_count[before]
        if after:
            self._by_count.setdefault(after, {})[tenant] = None
        if after > self._longest:
            self._longest = after
        while self._longest and self._longest not in self._by_count:
            self._longest -= 1


class RecentCalls:
    """The newest ended calls of one gateway process, and the sums over all ended calls."""

    def __init__(self, clock: Callable[[], float], max_calls: int = MAX_CALLS) -> None:
        """`clock`: returns monotonic seconds; the times of the calls are from the same clock. `max_calls`: largest
        number of calls that are kept."""
        self._clock = clock
        self._number = 0
        self.calls = FairRing(max_calls)
        self._tenants: dict[str, CallSums] = {}
        self._models: dict[str, CallSums] = {}

    @property
    def tenants(self) -> Mapping[str, CallSums]:
        """The sums over recent calls, by tenant."""
        return self._tenants

    @property
    def models(self) -> Mapping[str, CallSums]:
        """The sums of each model."""
        return self._models

    def record(self, opening: Opening | PoolingOpening, outcome: Outcome) -> None:
        """Record a call that has ended, or that could not begin. Takes a few microseconds."""
        call, meta = opening.call, opening.meta
        self._number = number = self._number + 1
        now, tenant, model = self._clock(), meta.tenant, opening.model_name[:MAX_CHARS]
        sums = self._tenants.get(tenant) or _new(self._tenants, tenant, MAX_TENANTS)
        sums.requests += 1
        request_id, trace_id = meta.request_id[:MAX_CHARS], opening.trace_id
        if call is None:
            of_caller = number, "", request_id, tenant, model, meta.api, outcome.value, opening.arrived, now
            ended = EndedCall(*of_caller, None, None, 0, 0.0, None, None, "", "", 0, trace_id)
            self.calls.add(ended)
            return
        usage, tokens = call.usage, new_tokens(call)
        sums.tokens += tokens
        sums.prompt_tokens += usage.prompt_tokens
        sums.cached_tokens += usage.cached_tokens
        of_model = self._models.get(call.model) or _new(self._models, call.model, MAX_MODELS)
        of_model.requests += 1
        of_model.tokens += tokens
        if call.first_token_at is not None:
            of_model.prompt_tokens += usage.prompt_tokens
            of_model.cached_tokens += usage.cached_tokens
        first = call.sequences[0] if call.sequences else None
        worker = None if first is None else first.worker
        route = None if first is None else first.route
        has_token = call.first_token_at is not None
        ended = EndedCall(
            number,
            call.shown_id,
            request_id,
            tenant,
            call.shown_model,
            meta.api,
            outcome.value,
            call.arrived,
            now,
            None if worker is None else usage.queue_s,
            usage.ttft_s if has_token else None,
            total_tokens(call),
            0.0 if call.is_pooling or first is None else mean_gap_s(call),
            usage.prompt_tokens,
            usage.cached_tokens if has_token else None,
            "" if worker is None else worker.worker_id,
            "" if route is None else route.reason,
            usage.resumed,
            trace_id,
        )
        self.calls.add(ended)

    def charge(self, tenant: str, model: str, cost: float) -> None:
        """Add the cost of a sequence that has ended."""
        (self._tenants.get(tenant) or _new(self._tenants, tenant, MAX_TENANTS)).cost += cost
        (self._models.get(model) or _new(self._models, model, MAX_MODELS)).cost += cost

    def forget_old(self) -> None:
        """Drop the calls that ended more than MAX_AGE_S ago."""
        self.calls.drop_older(self._clock() - MAX_AGE_S)


def total_tokens(call: Call) -> int:
    """Return the number of tokens of a call's outputs, including those that an earlier gateway delivered."""
    return sum(len(sequence.emitted) for sequence in call.sequences)


def _new(sums: dict[str, CallSums], name: str, most: int) -> CallSums:
    if len(sums) >= most:
        del sums[next(iter(sums))]
    sums[name] = fresh = CallSums()
    return fresh
