"""Hedging before the first token: a sequence whose worker is late is also sent to a second worker. The first of the two
workers to answer keeps the sequence.

Problem: a worker may be slow without failing any check. A caller should not wait for such a worker while another one is
free, but the second workers must get little additional load.

Method: a sequence is late once it has waited longer than the QUANTILE of the model's times to the first token for
prompts of its size (first_token_times.py). Each sequence that is sent adds `share` to the number of hedges that are
available for its model, and each hedge takes 1 from this number. A late sequence that is not hedged is checked again
each time its wait has grown by the factor GROWTH. At its first check, a sequence is hedged only if at least BURST / 2
hedges are available. So hedges are left for sequences that have waited longer: a sequence that is a little late is
likely to be answered soon, but a sequence on a slow worker is not.

Invariants: the hedges of a model never exceed `share` of the model's sequences that were sent so far, and at most BURST
hedges are available at once. A sequence is hedged at most once before its first output. A sequence is hedged only if no
sequence of its model waits, and if at least MIN_FREE of the capacity of the other workers is free.

Source: hedged requests of Dean and Barroso, "The Tail at Scale" (CACM 56(2), 2013).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.scheduling.first_token_times import FirstTokenTimes

BURST = 10.0
"""Number of hedges that a model may save up."""
GROWTH = 1.5
"""Factor by which the wait of a late sequence grows until the sequence is checked again."""
MIN_FREE = 0.2
"""Smallest free part of the other workers' capacity in sequences. Below it, the model counts as overloaded."""
SHORTEST_S = 0.05
"""Shortest wait in seconds after which a sequence is late. An earlier hedge would gain less than the link costs."""


@dataclass(slots=True)
class _Hedge:
    worker: str
    uncached_tokens: int
    sent_at: float


@dataclass(slots=True)
class _Sent:
    """A sequence that was sent and has no output yet.

    `wait_s`: seconds from `sent_at` until the sequence is checked next. The first check is when the sequence counts as
    late. `hedge`: the second worker, while both workers have the sequence; else None.
    """

    model: str
    worker: str
    uncached_tokens: int
    sent_at: float
    wait_s: float
    number: int
    was_hedged: bool
    looks: int = 0
    """Number of times that the sequence was found late."""
    hedge: _Hedge | None = None


class HedgingPolicy:
    """Decides which late sequences of one gateway are hedged, that is, also sent to a second worker. `now` is
    monotonic, in seconds."""

    def __init__(self, share: float, routing: RoutingSettings | None = None) -> None:
        """`share`: largest fraction of a model's sequences that may be hedged, in [0, 1]. With 0, no sequence is hedged
        and no times are learnt. `routing`: how the second worker is chosen; None: by the default settings."""
        self.share = share
        self._routing = routing
        self._times = FirstTokenTimes()
        self._sent: dict[str, _Sent] = {}
        self._due: list[tuple[float, int, str]] = []
        self._saved: dict[str, float] = {}
        """Number of hedges that a model may make now."""
        self._numbers = 0

    def __len__(self) -> int:
        """Return the number of sequences without output."""
        return len(self._sent)

    @property
    def next_due(self) -> float:
        """Time at which the caller must call `late` next; infinity if no call is needed."""
        return self._due[0][0] if self._due else math.inf

    def sent(self, key: str, model: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Record that a sequence was sent to its first worker, or to another worker after a loss. `key`: id of the
        sequence. `uncached_tokens`: number of prompt tokens that the worker is expected to compute."""
        if self.share <= 0:
            return
        before = self._sent.get(key)
        if before is None:
            self._saved[model] = min(self._saved.get(model, 0.0) + self.share, BURST)
        self._numbers += 1
        high_s = self._times.high(model, uncached_tokens, now)
        wait_s = math.inf if high_s is None else max(high_s, SHORTEST_S)
        was_hedged = before is not None and before.was_hedged
        self._sent[key] = _Sent(model, worker_id, uncached_tokens, now, wait_s, self._numbers, was_hedged)
        if high_s is not None and not was_hedged:
            heapq.heappush(self._due, (now + wait_s, self._numbers, key))

    def knows(self, model: str, uncached_tokens: int, now: float) -> bool:
        """Return whether enough first tokens were observed to decide when a first token is late."""
        return self._times.high(model, uncached_tokens, now) is not None

    def late(self, now: float) -> Iterator[str]:
        """Yield the keys of the sequences whose first token is late now. The caller calls `may_hedge` for each of
        them."""
        while self._due:
            due, number, key = self._due[0]
            sent = self._sent.get(key)
            if sent is None or sent.number != number or sent.was_hedged:  # answered, sent again or hedged
                heapq.heappop(self._due)
                continue
            if due > now:
                break
            heapq.heappop(self._due)
            sent.looks += 1
            sent.wait_s *= GROWTH
            while sent.sent_at + sent.wait_s <= now:
                sent.looks += 1
                sent.wait_s *= GROWTH
            heapq.heappush(self._due, (sent.sent_at + sent.wait_s, number, key))
            yield key

    def worker_of(self, key: str) -> str:
        """Return the worker of a sequence that has no output yet; "" for an unknown sequence. While two workers have
        the sequence, the first one is returned."""
        return sent.worker if (sent := self._sent.get(key)) is not None else ""

    def may_hedge(self, key: str, waiting: int) -> bool:
        """Return whether a sequence may be hedged now. A second worker must still be found (`second_worker`).
        `waiting`: number of sequences of the same model that wait for a worker."""
        sent = self._sent.get(key)
        if sent is None or sent.was_hedged or waiting:
            return False
        return self._saved.get(sent.model, 0.0) >= (1.0 if sent.looks > 1 else BURST / 2)

    def second_worker(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """Choose the second worker of a sequence that may be hedged. The decision has no worker if too little capacity
        is free.

        `call`: routing request that excludes the first worker. `candidates`: all workers of the model that are
        compatible with the first worker.
        """
        others = [c for c in candidates if c.healthy and not c.draining and not c.retired]
        others = [c for c in others if c.incarnation not in call.excluded]
        running = [max(c.running, c.engine_running) for c in others]
        slots = [c.slots or c.free_sequences + used for c, used in zip(others, running, strict=True)]
        if sum(slots) - sum(running) < MIN_FREE * sum(slots):
            return RoutingDecision(None, "overloaded", ())
        return choose(call, [c for c in others if not c.waiting], self._routing)

    def hedged(self, key: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Record that a sequence was sent to a second worker. `uncached_tokens`: number of prompt tokens that the
        second worker is expected to compute. Raises KeyError for an unknown sequence."""
        sent = self._sent[key]
        self._saved[sent.model] -= 1.0
        sent.was_hedged, sent.hedge = True, _Hedge(worker_id, uncached_tokens, now)

    def hedge_ended(self, key: str, won: bool, now: float) -> int:
        """Record which of a sequence's two workers keeps the sequence: the second worker if `won`, else the first.
        Returns the number of prompt tokens that the other worker was expected to compute."""
        sent = self._sent.get(key)
        if sent is None or sent.hedge is None:
            return 0
        hedge, sent.hedge = sent.hedge, None
        if not won:
            return hedge.uncached_tokens
        # The first worker's wait is a lower bound of its time to first token. Without it, hedging would make a slow
        # worker look fast.
        self._times.observe(sent.model, sent.worker, sent.uncached_tokens, now - sent.sent_at, now)
        in_vain = sent.uncached_tokens
        sent.worker, sent.uncached_tokens, sent.sent_at = hedge.worker, hedge.uncached_tokens, hedge.sent_at
        return in_vain

    def answered(self, key: str, uncached_tokens: int, now: float) -> None:
        """Record the first output of a sequence, from the worker that keeps the sequence. `uncached_tokens`: number of
        prompt tokens that the worker has computed."""
        sent = self._sent.pop(key, None)
        if sent is not None:
            self._times.observe(sent.model, sent.worker, uncached_tokens, now - sent.sent_at, now)

    def forget(self, key: str) -> None:
        """Forget a sequence whose call has ended."""
        self._sent.pop(key, None)

    def retain_models(self, models: Iterable[str]) -> None:
        """Forget the available hedges of all models that are not in `models`."""
        known = set(models)
        for model in [model for model in self._saved if model not in known]:
            del self._saved[model]

    def __repr__(self) -> str:
        return f"HedgingPolicy({len(self._sent)} sent, share {self.share:g})"
