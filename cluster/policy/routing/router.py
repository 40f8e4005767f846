"""Which worker takes a call, and why: filters, then scorers, then the best.

Problem: the call at the head of its queue may go to any worker of its model that has granted room for it; the load
should even out, and a human must be able to ask why it went where it went.
Invariants: the chosen worker passed every filter; no other that passed scores higher; equal inputs give equal
decisions, whatever the order of the candidates; every candidate is in the decision, with its scores or with the
filter that dropped it (none, where what is free is kept for others).
Source: the filter-scorer-picker pipeline of Kubernetes' scheduler and of the Gateway API inference extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.api.types import CompatibilityKey


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker as seen by the gateway that chooses. Room is what it has granted to this gateway and is unspent.

    `running` are this gateway's sequences there, `waiting` those in the engine's own queue, `kv_usage` in [0, 1].
    `replaying` tokens of continued calls of this gateway wait there for the engine's next step, `beginning` of others;
    where there are any of the former, no more than `max_replaying` may in all.
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
    likeness: CompatibilityKey | None = None
    replaying: int = 0
    beginning: int = 0
    max_replaying: int = 0
    retired: bool = False
    """It is being replaced, or its version is quarantined: what has begun may go on there, nothing begins."""


@dataclass(frozen=True, slots=True)
class RouteCall:
    """What of a call matters for its way. `tokens` are there before its next one: those of its prompt, and of a
    continued call those that it has emitted; `fresh` of them are likely to be computed, 0 for all. It goes nowhere
    unless more than `keep_free` sequences are free in all. A continued one has the `likeness` of the worker that began
    it; it shuns the incarnations at which it has failed. One that begins goes to one of `versions`, any where there are
    none. The incarnation `home` is where the last of a continued one was computed: its KV blocks are there still, for
    all that is known, and only `fresh_home` tokens are to be computed anew."""

    model: str
    tokens: int
    keep_free: int = 0
    likeness: CompatibilityKey | None = None
    shuns: frozenset[str] = frozenset()
    versions: frozenset[str] = frozenset()
    fresh: int = 0
    home: str = ""
    fresh_home: int = 0


@dataclass(frozen=True, slots=True)
class Filter:
    """Who may not take the call. `reason` is one word for metrics and humans."""

    reason: str
    passes: Callable[[RouteCall, Candidate], bool]


@dataclass(frozen=True, slots=True)
class Scorer:
    """How good a worker is for the call, in [0, 1], 1 the best; `weight` above 0."""

    name: str
    score: Callable[[RouteCall, Candidate], float]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Score:
    """What became of one candidate: `dropped` by a filter's reason, or its scores by the scorers' names.

    `total` is the weighted mean of the parts, in [0, 1]; 0 for one that was dropped.
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
    """Where the call goes, or None, and why.

    `reason` is one of few words (a metric label): least_loaded, only_choice; without a worker no_worker, kept_free, or
    the reason of the filter that dropped those who came furthest.
    """

    worker_id: str | None
    reason: str
    scores: tuple[Score, ...]

    def explain(self) -> str:
        """One line for a human: the choice, then every candidate, the best first."""
        where = f"to {self.worker_id}" if self.worker_id is not None else "nowhere"
        candidates = "; ".join(str(score) for score in self.scores) or "no candidates"
        return f"{where}, {self.reason}: {candidates}"


def _replays_fit(call: RouteCall, c: Candidate) -> bool:
    """Continued calls come in crowds; computed all at once, or with prompts beside, they would hold up everybody's next
    token. One of them may go alone, however long."""
    waiting = c.replaying if call.likeness is None else c.replaying + c.beginning
    return not waiting or c.replaying + c.beginning + fresh_at(call, c) <= c.max_replaying


def fresh_at(call: RouteCall, c: Candidate) -> int:
    """Tokens that it would have to compute there."""
    return call.fresh_home if _at_home(call, c) else call.fresh or call.tokens


def takes_onward(c: Candidate) -> bool:
    """Whether it may have room for any continued call: most often nobody has, and many wait."""
    return c.free_sequences > 0 and (not c.replaying or c.replaying + c.beginning < c.max_replaying)


def _at_home(call: RouteCall, c: Candidate) -> bool:
    return bool(call.home) and c.incarnation == call.home


def _places(_: RouteCall, c: Candidate) -> float:
    return c.free_sequences / (c.free_sequences + c.running)


def _memory(_: RouteCall, c: Candidate) -> float:
    return 1.0 - min(max(c.kv_usage, 0.0), 1.0)


def _queue(_: RouteCall, c: Candidate) -> float:
    return 1.0 / (1.0 + c.waiting)


def _prefill(_: RouteCall, c: Candidate) -> float:
    return 1.0 / (1.0 + c.prefill_tokens / PREFILL_TOKENS)


def _replays(_: RouteCall, c: Candidate) -> float:
    return 1.0 - min(c.replaying / c.max_replaying, 1.0) if c.max_replaying else 0.0


def _kept(call: RouteCall, c: Candidate) -> float:
    return 1.0 if _at_home(call, c) else 0.0


def is_like(call: RouteCall, candidate: Candidate) -> bool:
    """Whether a call that goes on may do so there, as far as weights and arithmetic go."""
    likeness = candidate.likeness
    return call.likeness is None or (likeness is not None and likeness.can_continue(call.likeness))


PREFILL_TOKENS = 2048
"""So many tokens of prompts before it are, for a call's first token, as bad as one call more in an engine's queue."""


FILTERS = (
    Filter("other_model", lambda call, c: c.model == call.model),
    Filter("unhealthy", lambda _, c: c.healthy),
    Filter("draining", lambda _, c: not c.draining),
    Filter("retired", lambda call, c: not c.retired or call.likeness is not None),
    Filter("other_version", lambda call, c: not call.versions or c.version in call.versions),
    Filter("other_weights", is_like),
    Filter("failed_there", lambda call, c: c.incarnation not in call.shuns),
    Filter("replaying", _replays_fit),
    Filter("no_free_sequence", lambda _, c: c.free_sequences > 0),
    Filter("too_few_free_tokens", lambda call, c: c.free_tokens >= call.tokens),
)
"""In this order: a candidate is dropped by the first that it does not pass."""

SCORERS = (
    Scorer("free_places", _places),
    Scorer("free_memory", _memory),
    Scorer("short_queue", _queue),
    Scorer("short_prefill", _prefill),
)
"""The least loaded, by the share of places free, of KV memory free, by the engine's own queue, and by the prompts that
are still before it."""

ONWARD_SCORERS = (*SCORERS, Scorer("few_replays", _replays, 8.0), Scorer("kept_blocks", _kept, 16.0))
"""For continued calls: back to where their KV blocks are, when it was the gateway that was lost; else those that fall
together are spread evenly, however the workers' queues looked at the last beat, since the longest step that they make
is what the last of them waits for."""


class Router:
    """One pipeline. The filters before the scorers may rely on what those drop (free_sequences > 0)."""

    def __init__(self, filters: Sequence[Filter] = FILTERS, scorers: Sequence[Scorer] = SCORERS) -> None:
        """Raises ValueError for no scorers or a weight that is not above 0."""
        if not scorers or any(scorer.weight <= 0 for scorer in scorers):
            raise ValueError("a router needs scorers, each with a weight above 0")
        self._filters = tuple(filters)
        self._scorers = tuple(scorers)
        self._weights = sum(scorer.weight for scorer in scorers)
        self._depth = {f.reason: depth for depth, f in enumerate(self._filters)}

    def pick(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """The best that may. Of equals the one with more free sequences, then the first by worker_id."""
        if call.keep_free:
            candidates = list(candidates)
            open_to_all = (c for c in candidates if c.model == call.model and not c.draining and not c.retired)
            if sum(c.free_sequences for c in open_to_all) <= call.keep_free:
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
    """The default pipelines: the least loaded of those with room, for continued calls by what of them waits there."""
    return (_LEAST_LOADED if call.likeness is None else _ONWARD).pick(call, candidates)
