"""Bounded memory of a gateway's routing decisions, for explanations of single calls.

Problem: an operator asks only afterwards why a call was sent to a worker, often when the call has ended. Each
decision has a score for each worker. Keeping all scores would fill the memory, and formatting them would cost each
call more than the routing itself.

Invariants: the estimated size of the memory never exceeds `max_bytes`, and the oldest calls are forgotten first. In
a fleet of up to MAX_CANDIDATES workers, the scores of a decision are read only when its call is explained. In a
larger fleet, reading a thousand scores takes milliseconds. So scores are read at the time of the decision, and at
most SCORES_PER_S of them a second. The best scores are kept, and the others are counted. For a decision whose scores
are not read, only the choice and its reason are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.policy.routing.router import RoutingDecision, Score

MAX_BYTES: Final = 16 << 20
"""Largest size of the route history of one gateway process, by the estimates below."""
MAX_CANDIDATES: Final = 16
"""Largest number of workers whose scores are kept for a decision."""
SCORES_PER_S: Final = 1000
"""Largest number of scores of large fleets that are read and kept in a second."""
MAX_ROUTES: Final = 64
"""Largest number of routes that are kept for one call: the newest ones."""
CALL_BYTES: Final = 1024
ROUTE_BYTES: Final = 1024
CANDIDATE_BYTES: Final = 1024
"""CALL_BYTES, ROUTE_BYTES and CANDIDATE_BYTES: estimated sizes in bytes of a call, a route and a candidate. A test
compares them with the measured sizes."""

Counts = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Workers that a routing decision compared. `best`: scores of at most MAX_CANDIDATES workers, the best first.
    `dropped`: number of workers that each filter dropped, by the filter's reason. `total`: number of all workers."""

    best: Sequence[Score]
    dropped: Counts
    total: int

    @classmethod
    def of(cls, scores: Sequence[Score]) -> Candidates:
        """Return the candidates of one decision: the best scores, and for each filter the number of workers that it
        dropped. `scores`: the scores of all workers, the best first."""
        dropped = Counter(score.dropped for score in scores if score.dropped)
        return cls(scores[:MAX_CANDIDATES], dict(dropped), len(scores))


@dataclass(eq=False, slots=True)
class Route:
    """A decision to send a sequence to a worker, and the result of the decision. Times are monotonic seconds.

    `sequence`: number of the sequence in its call. `tokens`: number of prompt tokens plus tokens that the sequence had
    emitted before. `cached`: number of leading tokens that workers were expected to hold in their KV caches, by worker
    id; None if there is no prediction. `is_exact`: whether the prediction is exact, provided that all KV events of the
    worker have arrived. `again`: why the sequence left its previous worker, or `late` if it was sent to a second worker
    because its first token was late; "" for its first route.
    """

    sequence: int
    sent_at: float
    worker_id: str
    reason: str
    tokens: int
    decision: RoutingDecision | Candidates | None = None
    cached: Mapping[str, int] | None = None
    is_exact: bool = False
    again: str = ""
    pod: str = ""
    """The worker's pod; "" outside Kubernetes. `node`: the worker's node."""
    node: str = ""
    awaited: str = ""
    """Id of the worker for which the sequence waited, since it held the prompt; "" if it did not wait."""
    wait_s: float = 0.0
    """Seconds that the sequence waited for the worker `awaited`."""
    cached_tokens: int | None = None
    """Number of tokens that the engine found in its KV cache; None before the worker's first output."""
    first_output_at: float | None = None
    size: int = ROUTE_BYTES
    """Estimated size in bytes."""

    @property
    def predicted_cached_tokens(self) -> int | None:
        """Number of leading tokens that the worker was expected to have in its KV cache; None without a prediction."""
        return None if self.cached is None else self.cached.get(self.worker_id, 0)

    @property
    def candidates(self) -> Candidates:
        """The workers that the router compared for this decision, with their scores."""
        decision = self.decision
        if isinstance(decision, Candidates):
            return decision
        return Candidates.of(() if decision is None else decision.scores)

    def keep(self, candidates: Candidates) -> None:
        """Keep only `candidates` of the decision. Numbers of cached tokens are kept only for the best candidates and
        for the chosen worker."""
        self.decision = candidates
        if self.cached is not None:
            kept = {self.worker_id, *(score.worker_id for score in candidates.best)}
            self.cached = {worker: tokens for worker in kept if (tokens := self.cached.get(worker))}

    def begin(self, cached_tokens: int, now: float) -> None:
        """Record the worker's first output. `cached_tokens`: number of tokens that the engine found in its cache."""
        if self.first_output_at is None:
            self.cached_tokens, self.first_output_at = cached_tokens, now


@dataclass(eq=False, slots=True)
class RoutedCall:
    """A call and its routes, the oldest first. `shown_id`: id in the answer to the caller. Times are monotonic
    seconds."""

    call_id: str
    shown_id: str
    request_id: str
    tenant: str
    model: str
    arrived_at: float
    routes: list[Route] = field(default_factory=list)
    omitted_routes: int = 0
    """Number of routes that are no longer remembered."""
    outcome: str = ""
    ended_at: float | None = None
    size: int = CALL_BYTES
    """Estimated size in bytes, with the routes."""

    def add(self, route: Route) -> None:
        """Add a route. The oldest route is forgotten if there are too many."""
        self.routes.append(route)
        self.size += route.size
        if len(self.routes) > MAX_ROUTES:
            self.size -= self.routes.pop(0).size
            self.omitted_routes += 1


class RouteHistory:
    """The newest routed calls of one gateway process."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._calls: dict[str, RoutedCall] = {}
        self._kept_at = -math.inf
        """Time of the last decision whose scores were kept, among decisions in large fleets."""
        self.size = 0
        """Estimated size in bytes of all calls."""

    def __len__(self) -> int:
        """Return the number of calls."""
        return len(self._calls)

    def call(self, call_id: str) -> RoutedCall | None:
        """Return a call by its id in the gateway; None for a call that has no route or is forgotten."""
        return self._calls.get(call_id)

    def add(self, call: RoutedCall, route: Route, workers: int) -> None:
        """Add a route to a call, and forget the oldest calls while the memory exceeds `max_bytes`. `call`: the
        remembered call, or a new one for a first route. `workers`: number of workers of the model."""
        if workers > MAX_CANDIDATES:
            self._shorten(route, workers)
        route.size = ROUTE_BYTES + CANDIDATE_BYTES * min(workers, MAX_CANDIDATES)
        before = call.size if call.call_id in self._calls else 0
        call.add(route)
        self._calls[call.call_id] = call
        self.size += call.size - before
        while self.size > self.max_bytes:
            oldest = self._calls.pop(next(iter(self._calls)))
            self.size -= oldest.size

    def _shorten(self, route: Route, workers: int) -> None:
        """Keep only the best scores of a route's decision, to save memory in a large fleet. If scores of another
        decision were kept shortly before, keep none.

        `workers`: number of workers in the fleet. The larger the fleet, the longer the pause between two decisions with
        scores.
        """
        if (route.sent_at - self._kept_at) * SCORES_PER_S >= workers:
            self._kept_at = route.sent_at
            route.keep(route.candidates)
        else:
            route.keep(Candidates((), {}, workers))

    def end(self, call_id: str, outcome: str, now: float) -> None:
        """Record the end of a call. Calls that are not remembered are ignored."""
        call = self._calls.get(call_id)
        if call is not None:
            call.outcome, call.ended_at = outcome, now

    def find(self, request_id: str, tenant: str = "") -> list[RoutedCall]:
        """Return the calls with this request id or answer id, the oldest first. `tenant`: if not empty, only calls of
        that tenant."""
        return [
            call
            for call in self._calls.values()
            if request_id in (call.request_id, call.shown_id) and tenant in ("", call.tenant)
        ]

    def span_s(self, now: float) -> float:
        """Return the seconds since the arrival of the oldest remembered call; 0 if there is none."""
        oldest = next(iter(self._calls.values()), None)
        return 0.0 if oldest is None else max(now - oldest.arrived_at, 0.0)
