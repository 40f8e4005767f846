"""Worker choice for one call, with its reasons: filters, then scorers, then the best score.

Problem: the call at the head of its queue may go to any worker of its model that has granted enough capacity. The load
should even out, and a human must be able to ask why a call went where it went.

Invariants: the chosen worker passed every filter; no other that passed scores higher; equal inputs give equal
decisions, whatever the order of the candidates; every candidate is in the decision, with its scores or with the filter
that dropped it (no candidate is listed if the free capacity is reserved for other tenants).

Source: the filter-scorer-picker pipeline of Kubernetes' scheduler and of the Gateway API inference extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.api.types import CompatibilityKey


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as the choosing gateway sees it. `free_*` is the unspent credit that it has granted to this gateway.

    `running` counts this gateway's sequences there, `waiting` those in the engine's own queue; `kv_usage` is in [0, 1].
    `replaying` is the number of prompt tokens of this gateway's resumed calls that wait there for the engine's next
    step, `beginning` the same for new calls. If `replaying` is above 0, both together must not exceed `max_replaying`.
    """

    worker_id: str
    model: str
    version: str
    free_sequences: int
    free_tokens: int
    running: int
    waiting: int
    kv_usage: float
    healthy: bool
    draining: bool
    prefill_tokens: int = 0
    """Prompt tokens of this gateway's calls there that have no output yet."""
    incarnation: str = ""
    compatibility_key: CompatibilityKey | None = None
    resumed_prefill: int = 0
    new_prefill: int = 0
    prefill_budget: int = 0
    retired: bool = False
    """Whether it is being replaced or its version is quarantined. It may resume calls, but gets no new ones."""


@dataclass(frozen=True, slots=True)
class RouteCall:
    """The fields of a call that routing uses.

    `tokens`: its prompt tokens, and for a resumed call also those that it has emitted. `fresh`: how many of them must
    probably be computed; 0 means all. `keep_free`: the call is sent nowhere unless more than this many sequences are
    free in total. `likeness`: compatibility key of the worker that began a resumed call; None for a new one. `shuns`:
    incarnations on which the call has failed; it must not be sent there again. `versions`: versions that a new call may
    go to; any if empty. `home`: incarnation that computed a resumed call last and probably still holds its KV blocks;
    only `fresh_home` tokens must be computed there.
    """

    model: str
    tokens: int
    reserved_slots: int = 0
    compatibility_key: CompatibilityKey | None = None
    excluded: frozenset[str] = frozenset()
    versions: frozenset[str] = frozenset()
    uncached_tokens: int = 0
    cached_on: str = ""
    uncached_there: int = 0


@dataclass(frozen=True, slots=True)
class Filter:
    """Condition that a worker must meet to get the call. `reason` is one word for metrics and humans."""

    reason: str
    passes: Callable[[RouteCall, Candidate], bool]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Score of a worker for the call, in [0, 1]; 1 is best. `weight` is above 0."""

    name: str
    score: Callable[[RouteCall, Candidate], float]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """Result for one candidate: the reason of the filter that `dropped` it, or its scores by the scorers' names.

    `total` is the weighted mean of the parts, in [0, 1]; 0 for a dropped candidate.
    """

    worker_id: str
    total: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()
    dropped: str = ""

    def __str__(self) -> str:
        if self.dropped:
            return f"{self.worker_id} {self.dropped}"
        return f"{self.worker_id} {self.total:.3f} ({', '.join(f'{name} {value:.3f}' for name, value in self.parts)})"


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """The chosen worker, or None, and the reason.

    `reason` is one of a few words (a metric label): least_loaded or only_choice; without a worker no_worker, kept_free,
    or the reason of the last filter in the order that dropped a candidate.
    """

    worker_id: str | None
    reason: str
    scores: tuple[Score, ...]

    def explain(self) -> str:
        """One line for humans: the choice, then every candidate, the best first."""
        where = f"to {self.worker_id}" if self.worker_id is not None else "nowhere"
        candidates = "; ".join(str(score) for score in self.scores) or "no candidates"
        return f"{where}, {self.reason}: {candidates}"


def _replays_fit(call: RouteCall, c: Candidate) -> bool:
    """Whether the prompts fit the worker's prefill pacing.

    Resumed calls come in bursts. If all are computed at once, or together with new prompts, they delay every stream's
    next token. A single one may go alone, however long it is.
    """
    waiting = c.resumed_prefill if call.compatibility_key is None else c.resumed_prefill + c.new_prefill
    return not waiting or c.resumed_prefill + c.new_prefill + uncached_tokens_at(call, c) <= c.prefill_budget


def uncached_tokens_at(call: RouteCall, c: Candidate) -> int:
    """Tokens that this worker would have to compute for the call."""
    return call.uncached_there if _at_home(call, c) else call.uncached_tokens or call.tokens


def may_take_resumed(c: Candidate) -> bool:
    """Cheap check whether the worker may have capacity for any resumed call. Usually it has none while many wait."""
    return c.free_sequences > 0 and (not c.resumed_prefill or c.resumed_prefill + c.new_prefill < c.prefill_budget)


def _at_home(call: RouteCall, c: Candidate) -> bool:
    return bool(call.cached_on) and c.incarnation == call.cached_on


def _places(_: RouteCall, c: Candidate) -> float:
    return c.free_sequences / (c.free_sequences + c.running)


def _memory(_: RouteCall, c: Candidate) -> float:
    return 1.0 - min(max(c.kv_usage, 0.0), 1.0)


def _queue(_: RouteCall, c: Candidate) -> float:
    return 1.0 / (1.0 + c.waiting)


def _prefill(_: RouteCall, c: Candidate) -> float:
    return 1.0 / (1.0 + c.prefill_tokens / PREFILL_TOKENS)


def _replays(_: RouteCall, c: Candidate) -> float:
    return 1.0 - min(c.resumed_prefill / c.prefill_budget, 1.0) if c.prefill_budget else 0.0


def _kept(call: RouteCall, c: Candidate) -> float:
    return 1.0 if _at_home(call, c) else 0.0


def is_compatible(call: RouteCall, candidate: Candidate) -> bool:
    """Whether the candidate's compatibility key lets a resumed call continue there. True for a new call."""
    likeness = candidate.compatibility_key
    return call.compatibility_key is None or (likeness is not None and likeness.can_resume(call.compatibility_key))


PREFILL_TOKENS = 2048
"""Prompt tokens queued ahead that delay a call's first token as much as one more call in the engine's queue."""


FILTERS = (
    Filter("other_model", lambda call, c: c.model == call.model),
    Filter("unhealthy", lambda _, c: c.healthy),
    Filter("draining", lambda _, c: not c.draining),
    Filter("retired", lambda call, c: not c.retired or call.compatibility_key is not None),
    Filter("other_version", lambda call, c: not call.versions or c.version in call.versions),
    Filter("other_weights", is_compatible),
    Filter("failed_there", lambda call, c: c.incarnation not in call.excluded),
    Filter("replaying", _replays_fit),
    Filter("no_free_sequence", lambda _, c: c.free_sequences > 0),
    Filter("too_few_free_tokens", lambda call, c: c.free_tokens >= call.tokens),
)
"""Applied in this order: a candidate is dropped by the first filter that it does not pass."""

SCORERS = (
    Scorer("free_places", _places),
    Scorer("free_memory", _memory),
    Scorer("short_queue", _queue),
    Scorer("short_prefill", _prefill),
)
"""Least load: the free share of sequences and of KV memory, the engine's own queue, and the prompts still to be
computed."""

ONWARD_SCORERS = (*SCORERS, Scorer("few_replays", _replays, 8.0), Scorer("kept_blocks", _kept, 16.0))
"""Scorers for resumed calls: first the worker that holds their KV blocks, if only the gateway was lost.

Otherwise a burst is spread evenly, whatever the workers' queues at the last heartbeat: the last call of the burst waits
for the longest step.
"""


class Router:
    """One pipeline. Scorers may rely on what the filters guarantee (free_sequences > 0)."""

    def __init__(self, filters: Sequence[Filter] = FILTERS, scorers: Sequence[Scorer] = SCORERS) -> None:
        """Raises ValueError if there are no scorers or a weight is not above 0."""
        if not scorers or any(scorer.weight <= 0 for scorer in scorers):
            raise ValueError("a router needs scorers, each with a weight above 0")
        self._filters = tuple(filters)
        self._scorers = tuple(scorers)
        self._weights = sum(scorer.weight for scorer in scorers)
        self._depth = {f.reason: depth for depth, f in enumerate(self._filters)}

    def pick(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """Best candidate that passes all filters. Ties go to more free sequences, then to the first worker_id."""
        if call.reserved_slots:
            candidates = list(candidates)
            open_to_all = (c for c in candidates if c.model == call.model and not c.draining and not c.retired)
            if sum(c.free_sequences for c in open_to_all) <= call.reserved_slots:
                return RoutingDecision(None, "kept_free", ())
        passed: list[tuple[float, int, str, Score]] = []
        dropped: list[Score] = []
        for candidate in candidates:
            score = self._score(call, candidate)
            if score.dropped:
                dropped.append(score)
            else:
                passed.append((-score.total, -candidate.free_sequences, candidate.worker_id, score))
        passed.sort(key=lambda entry: entry[:3])
        dropped.sort(key=lambda score: score.worker_id)
        scores = (*(entry[3] for entry in passed), *dropped)
        if passed:
            return RoutingDecision(scores[0].worker_id, "least_loaded" if len(passed) > 1 else "only_choice", scores)
        return RoutingDecision(None, self._why_nobody(dropped), scores)

    def _score(self, call: RouteCall, candidate: Candidate) -> Score:
        for f in self._filters:
            if not f.passes(call, candidate):
                return Score(candidate.worker_id, dropped=f.reason)
        parts = tuple((scorer.name, scorer.score(call, candidate)) for scorer in self._scorers)
        total = sum(s.weight * value for s, (_, value) in zip(self._scorers, parts, strict=True)) / self._weights
        return Score(candidate.worker_id, total, parts)

    def _why_nobody(self, dropped: Sequence[Score]) -> str:
        furthest = max((score.dropped for score in dropped), key=self._depth.__getitem__, default="no_worker")
        return "no_worker" if furthest == "other_model" else furthest


_LEAST_LOADED, _ONWARD = Router(), Router(scorers=ONWARD_SCORERS)


def pick(call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
    """Apply a default pipeline: least load for new calls; for resumed ones also cached blocks and waiting prompts."""
    return (_LEAST_LOADED if call.compatibility_key is None else _ONWARD).pick(call, candidates)
