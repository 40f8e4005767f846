"""Choice of a worker for one call: the filters, and the scores of resumed calls. The decision contains the reasons.

Problem: the call at the head of its queue may go to any worker of its model that has granted enough capacity. The load
should be spread evenly, and an operator must be able to see why a call went to a worker. New calls pass the same
filters and are then routed by their cost, see fleet.py.

Invariants: the chosen worker passed every filter, and no other worker that passed has a higher score. Equal inputs give
equal decisions, whatever the order of the candidates. The decision lists every candidate, with its scores or with the
filter that dropped the candidate. Exception: the list is empty if the free capacity is reserved for other tenants.

Source: the filter-scorer-picker pipeline of Kubernetes' scheduler and of the Gateway API inference extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.api.frozen import frozen_dataclass
from cluster.api.types import CompatibilityKey
from cluster.policy.routing.version_split import Build


@frozen_dataclass
class Candidate:
    """A worker as seen by the gateway that routes a call.

    `free_sequences` and `free_tokens`: capacity that the worker has granted to this gateway and that is still unused.
    `running`: number of this gateway's sequences on the worker. `waiting`: number of sequences in the engine's queue.
    `kv_usage`: used share of the KV memory, in [0, 1].

    `resumed_prefill` and `new_prefill`: prompt tokens of this gateway's resumed calls, and of its new calls, that wait
    on the worker for the next engine step. While `resumed_prefill` is above 0, the sum of both must stay within
    `prefill_budget`.
    """

    worker_id: str
    model: str
    build: Build
    free_sequences: int
    free_tokens: int
    running: int
    waiting: int
    kv_usage: float
    healthy: bool
    draining: bool
    prefill_tokens: int = 0
    """Number of prompt tokens of those calls of this gateway on the worker that have no output yet."""
    incarnation: str = ""
    compatibility_key: CompatibilityKey | None = None
    resumed_prefill: int = 0
    new_prefill: int = 0
    prefill_budget: int = 0
    retired: bool = False
    """Whether the worker is being replaced, or the version of the worker is quarantined. The worker may resume calls,
    but gets no new calls, except those that no other worker can serve (Fleet.pick)."""
    quarantined: bool = False
    """Whether the version of the worker is quarantined."""
    node: str = ""
    block_size: int = 0
    """Number of tokens in a KV block of the worker's engine."""
    parses_tools: bool = False
    """Whether the worker has a parser for tool calls."""
    last_sent: float = 0.0
    """Time of the last sequence that this gateway has sent to the worker, in monotonic seconds."""
    unanswered: int = 0
    """Number of this gateway's sequences on the worker that have no output yet."""
    slots: int = 0
    """Number of sequences that the worker's engine runs at once; 0 if unknown."""
    slowdown: float = 1.0
    """Time that the worker needs for a prompt, relative to a usual worker of the model. Above 0."""
    engine_running: int = 0
    """Number of sequences of all gateways that the worker's engine runs, as last reported."""
    adapters: frozenset[str] = frozenset()
    """Adapters for which the worker takes calls, by the names that RouteCall.adapter may have."""
    resident: frozenset[str] = frozenset()
    """The part of `adapters` that lies in slots of the engine."""


@frozen_dataclass
class RouteCall:
    """Fields of a call that routing uses.

    Fields of all calls. `tokens`: number of prompt tokens; for a resumed call, the sum of prompt tokens and emitted
    tokens. `reserved_slots`: number of slots that must stay free for other tenants. The call is sent only if the
    workers of its model together have more free slots than that. `excluded`: incarnations to which the call must not be
    sent. `needs_tools`: whether the worker must have a parser for tool calls. `adapter`: digest of the adapter that the
    worker must have loaded, or another name that the gateway uses while the digest is unknown; "" for the base model.

    Fields of new calls. `call_id`: the call's id, the seed of policies that choose at random. `versions`: versions on
    which the call may begin; empty means any version. `bundle_digest` and `weight_digest`: the tokenizer bundle and the
    weights that the worker must have; "" for any. `has_begun`: whether other sequences of the call have begun on such a
    version; then a worker that is being replaced may finish the call if no other can. `cached`: number of leading
    prompt tokens that each worker holds in its KV cache, by worker id, in ascending order of the numbers. `sharing`:
    number of recent calls that had the same longest cached prefix as this call. `affinity`: hash of the affinity key,
    in [1, 2**64), or 0 for none. `prefix`: hash of the beginning of the prompt, in [0, 2**64).

    Fields of resumed calls. `compatibility_key`: key of the worker that began the call; None for a new call.
    `uncached_tokens`: how many of `tokens` a worker must probably compute; 0 means all. `cached_on`: incarnation that
    probably still holds the call's KV blocks, or "". `uncached_there`: number of tokens that `cached_on` must compute.
    """

    model: str
    tokens: int
    reserved_slots: int = 0
    compatibility_key: CompatibilityKey | None = None
    excluded: frozenset[str] = frozenset()
    versions: frozenset[str] = frozenset()
    bundle_digest: str = ""
    weight_digest: str = ""
    has_begun: bool = False
    uncached_tokens: int = 0
    cached_on: str = ""
    uncached_there: int = 0
    needs_tools: bool = False
    cached: Mapping[str, int] = field(default_factory=dict)
    sharing: float = 0.0
    affinity: int = 0
    prefix: int = 0
    call_id: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class FullHolder:
    """A worker that has no room for a call, but would cost less than the chosen worker, since it holds more of
    the prompt.

    `gain`: how much lower its cost is. `per_sequence`: cost that each further sequence on this worker adds.
    `wait`: expected time to the call's first token on this worker. It is measured in prompt tokens: the number
    that a usual worker computes in this time. `limit`: longest `wait` that is allowed. It is the expected time
    to the first token on the chosen worker, or CostWeights.patience if that is longer. `uncached`: number of
    the call's prompt tokens that this worker must compute. `slowdown`: time that this worker needs for a
    prompt, relative to a usual worker of its model.
    """

    worker_id: str
    gain: float
    per_sequence: float
    wait: float
    limit: float
    uncached: float
    slowdown: float


@dataclass(frozen=True, slots=True)
class Filter:
    """Condition that a worker must meet to get the call. `reason` is one word, for metrics and humans."""

    reason: str
    passes: Callable[[RouteCall, Candidate], bool]


@dataclass(frozen=True, slots=True)
class Scorer:
    """Function that scores a worker for a call. A score is in [0, 1], and 1 is best. `weight`: weight of the score,
    above 0."""

    name: str
    score: Callable[[RouteCall, Candidate], float]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """Result for one candidate.

    `dropped`: reason of the filter that dropped the candidate; "" if it passed all. `total`: for a new call, the cost
    of the candidate (the lowest is best); for a resumed call, the weighted mean of the candidate's scores, in [0, 1]
    (the highest is best); for a dropped candidate, 0. `parts`: pairs of name and value, the parts of the cost or the
    single scores.
    """

    worker_id: str
    total: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()
    dropped: str = ""

    def __str__(self) -> str:
        if self.dropped:
            return f"{self.worker_id} {self.dropped}"
        return f"{self.worker_id} {self.total:.3f} ({', '.join(f'{name} {value:.3f}' for name, value in self.parts)})"


class RoutingDecision:
    """Result of routing: the chosen worker, or None, and the reason.

    `reason` is one of a few words, used as a metric label. With a worker the reason is only_choice, cached_prefix,
    least_loaded, or the name of a simpler policy (RoutingSettings). Without a worker the reason is no_worker,
    kept_free, or the reason of the last filter in FILTERS that dropped a candidate.

    The scores of a thousand workers take milliseconds, so they are computed when they are first read. The decision
    keeps the workers as they were when it was made.
    """

    __slots__ = ("_reason", "_scores", "cached_tokens", "full_holders", "is_restricted", "worker_id")

    def __init__(
        self,
        worker_id: str | None,
        reason: str | None,
        scores: tuple[Score, ...] | Callable[[], tuple[Score, ...]],
        cached_tokens: int = 0,
        full_holders: Sequence[FullHolder] = (),
        is_restricted: bool = False,
    ) -> None:
        """`reason`: None if the reason follows from the scores. `scores`: the scores, or a function that computes them.
        `cached_tokens`: number of leading tokens of the call that the chosen worker holds in its KV cache.
        `full_holders`: workers that would cost less than the chosen worker but have no room for the call.
        `is_restricted`: whether some workers are of a build on which the call may not run."""
        self.worker_id = worker_id
        self.cached_tokens = cached_tokens
        self.full_holders = full_holders
        self.is_restricted = is_restricted
        self._reason = reason
        self._scores = scores

    @property
    def reason(self) -> str:
        """Reason of the decision, in one word."""
        if self._reason is None:
            self._reason = why_nobody(self.scores)
        return self._reason

    @property
    def scores(self) -> tuple[Score, ...]:
        """Scores of all candidates: first the candidates that passed all filters, the best one first, then the dropped
        candidates, ordered by worker id."""
        if callable(self._scores):
            self._scores = self._scores()
        return self._scores

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingDecision):
            return NotImplemented
        return (self.worker_id, self.reason, self.scores) == (other.worker_id, other.reason, other.scores)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RoutingDecision({self.worker_id!r}, {self.reason!r})"

    def explain(self) -> str:
        """Return the decision as one line for humans: the choice, then every candidate, the best one first."""
        where = f"to {self.worker_id}" if self.worker_id is not None else "nowhere"
        candidates = "; ".join(str(score) for score in self.scores) or "no candidates"
        return f"{where}, {self.reason}: {candidates}"


def _replays_fit(call: RouteCall, c: Candidate) -> bool:
    """Return whether the worker can take the prompt of the call now, within its budget for resumed prompts (prefill
    pacing).

    Resumed calls come in bursts. If all resumed prompts are computed at once, or together with new prompts, the next
    token of every stream is late. A single resumed prompt may be computed alone, however long the prompt is.
    """
    waiting = c.resumed_prefill if call.compatibility_key is None else c.resumed_prefill + c.new_prefill
    return not waiting or c.resumed_prefill + c.new_prefill + uncached_tokens_at(call, c) <= c.prefill_budget


def uncached_tokens_at(call: RouteCall, c: Candidate) -> int:
    """Number of tokens that the worker would have to compute for the call."""
    return call.uncached_there if _at_home(call, c) else call.uncached_tokens or call.tokens


def may_take_resumed(c: Candidate) -> bool:
    """Return False if the worker certainly cannot take a resumed call. This is a cheap check before routing.

    While many resumed calls wait, this check makes it unnecessary to route most of them.
    """
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
    """Return whether the candidate can continue the call, according to the compatibility keys of both. True for every
    new call."""
    likeness = candidate.compatibility_key
    return call.compatibility_key is None or (likeness is not None and likeness.can_resume(call.compatibility_key))


def needs_parser(needs_tools: bool, candidates: Iterable[Candidate]) -> bool:
    """Whether a call that needs tools must go to a worker with a parser for tool calls.

    False if no worker has such a parser. The call then goes to any worker, which refuses it with an error that says
    why. If the call waited instead, it would stay at the head of its queue and hold back all calls behind it.
    """
    return needs_tools and any(c.parses_tools for c in candidates)


PREFILL_TOKENS = 2048
"""Number of prompt tokens, in calls without output, that score as badly as one call in the queue of the engine."""


FILTERS = (
    Filter("other_model", lambda call, c: c.model == call.model),
    Filter("unhealthy", lambda _, c: c.healthy),
    Filter("draining", lambda _, c: not c.draining),
    Filter("retired", lambda call, c: not c.retired or call.compatibility_key is not None),
    Filter("other_version", lambda call, c: c.build.is_one_of(call.versions, call.bundle_digest, call.weight_digest)),
    Filter("other_weights", is_compatible),
    Filter("no_tool_parser", lambda call, c: c.parses_tools or not call.needs_tools),
    Filter("no_adapter", lambda call, c: not call.adapter or call.adapter in c.adapters),
    Filter("failed_there", lambda call, c: c.incarnation not in call.excluded),
    Filter("replaying", _replays_fit),
    Filter("no_free_sequence", lambda _, c: c.free_sequences > 0),
    Filter("too_few_free_tokens", lambda call, c: c.free_tokens >= call.tokens),
)
"""Filters in the order of application. A candidate is dropped by the first filter that the candidate does not pass."""


def dropped_by(call: RouteCall, candidate: Candidate, filters: Iterable[Filter] = FILTERS) -> str:
    """Return the reason of the first filter that drops a candidate; "" if the candidate passes all filters."""
    return next((f.reason for f in filters if not f.passes(call, candidate)), "")


def why_nobody(scores: Iterable[Score]) -> str:
    """Return the reason why no candidate was picked: the reason of the last filter in FILTERS that dropped a candidate;
    `no_worker` if all candidates are of other models."""
    dropped = {score.dropped for score in scores}
    furthest = next((f.reason for f in reversed(FILTERS) if f.reason in dropped), "no_worker")
    return "no_worker" if furthest == "other_model" else furthest


SCORERS = (
    Scorer("free_places", _places),
    Scorer("free_memory", _memory),
    Scorer("short_queue", _queue),
    Scorer("short_prefill", _prefill),
)
"""Scorers for the least load: the free share of sequences, the free share of KV memory, the queue of the engine, and
the prompts that are not computed yet."""

ONWARD_SCORERS = (*SCORERS, Scorer("few_replays", _replays, 8.0), Scorer("kept_blocks", _kept, 16.0))
"""Scorers for resumed calls. `kept_blocks` prefers the worker that holds the KV blocks of the call.

If no worker holds the KV blocks of resumed calls, `few_replays` spreads these calls evenly over the workers, because
the last call of a burst waits for the longest step. The weight of `few_replays` exceeds that of `short_queue`, whose
queue lengths are as old as the last heartbeat.
"""


class Router:
    """Pipeline of filters and scorers. Scorers see only the workers that passed the filters; each of these workers has
    a `free_sequences` above 0."""

    def __init__(self, filters: Sequence[Filter] = FILTERS, scorers: Sequence[Scorer] = SCORERS) -> None:
        """Create a pipeline. Raises ValueError if there are no scorers or a weight is not above 0."""
        if not scorers or any(scorer.weight <= 0 for scorer in scorers):
            raise ValueError("a router needs scorers, each with a weight above 0")
        self._filters = tuple(filters)
        self._scorers = tuple(scorers)
        self._weights = sum(scorer.weight for scorer in scorers)

    def pick(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """Pick the candidate with the best score among the candidates that pass all filters.

        Of candidates with equal scores, the candidate that can take more sequences (`free_sequences`) is picked. If
        these numbers are equal too, the candidate with the earlier `last_sent` is picked, so that idle workers fill
        their caches evenly. The worker id decides last, the smaller one first.
        """
        if call.reserved_slots:
            candidates = list(candidates)
            open_to_all = (c for c in candidates if c.model == call.model and not c.draining and not c.retired)
            if sum(c.free_sequences for c in open_to_all) <= call.reserved_slots:
                return RoutingDecision(None, "kept_free", ())
        passed: list[tuple[float, int, float, str, Score]] = []
        dropped: list[Score] = []
        for candidate in candidates:
            score = self._score(call, candidate)
            if score.dropped:
                dropped.append(score)
            else:
                order = (-score.total, -candidate.free_sequences, candidate.last_sent, candidate.worker_id)
                passed.append((*order, score))
        passed.sort(key=lambda entry: entry[:4])
        dropped.sort(key=lambda score: score.worker_id)
        scores = (*(entry[4] for entry in passed), *dropped)
        if passed:
            return RoutingDecision(scores[0].worker_id, "least_loaded" if len(passed) > 1 else "only_choice", scores)
        return RoutingDecision(None, None, scores)

    def _score(self, call: RouteCall, candidate: Candidate) -> Score:
        if reason := dropped_by(call, candidate, self._filters):
            return Score(candidate.worker_id, dropped=reason)
        parts = tuple((scorer.name, scorer.score(call, candidate)) for scorer in self._scorers)
        total = sum(s.weight * value for s, (_, value) in zip(self._scorers, parts, strict=True)) / self._weights
        return Score(candidate.worker_id, total, parts)


_NEW, _ONWARD = Router(), Router(scorers=ONWARD_SCORERS)


def pick(call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
    """Pick a worker by scores.

    For a resumed call, the scores of a worker are its load, its waiting prompts and the KV blocks that it holds. For
    any other call, the only score is the load. New calls of the waiting room are routed by cost instead, see fleet.py.
    """
    return (_NEW if call.compatibility_key is None else _ONWARD).pick(call, candidates)
