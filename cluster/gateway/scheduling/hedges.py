"""The hedges of one gateway. Sequences without output are watched, and a sequence whose first token is late is also
sent to a second worker.

policy/scheduling/hedging.py decides which sequences are hedged. This module carries out the decisions, and reports the
end of each hedge to the policy. If a model has only one worker, its sequences are not watched, because there is no
second worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.routes import Routes
from cluster.gateway.scheduling.submission import submit_hedge
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.gateway.scheduling.workers import LinkedWorkers, ModelFleets
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.router import Candidate, RouteCall, needs_parser
from cluster.policy.scheduling.hedging import HedgingPolicy

if TYPE_CHECKING:
    from cluster.gateway.usage.open_accounts import OpenAccounts

LOOK_S = 0.01
"""Minimum time in seconds between two searches for late sequences, which bounds the cost of the searches."""


class Hedges:
    """The hedges (second submissions of late sequences) of one gateway, for all models."""

    def __init__(
        self,
        policy: HedgingPolicy,
        queues: Queues,
        workers: LinkedWorkers,
        fleets: ModelFleets,
        caches: WorkerCaches,
        breakers: Breakers,
        metrics: Metrics,
        routes: Routes,
        place: Callable[[CallSequence], WaitingSequence | None],
        accounts: Callable[[], OpenAccounts | None],
        clock: Callable[[], float],
    ) -> None:
        """`place`: returns the waiting room's entry of a sequence. `accounts`: returns the gateway's open accounts, or
        None if the gateway keeps no accounts."""
        self.policy = policy
        self._queues = queues
        self._workers = workers
        self._fleets = fleets
        self._caches = caches
        self._breakers = breakers
        self._metrics = metrics
        self._routes = routes
        self._place = place
        self._accounts = accounts
        self._clock = clock
        self._sequences: dict[str, CallSequence] = {}
        self._wakes_at = -math.inf
        """Time at which `watch` looks for late sequences next; -infinity before `watch` runs."""
        self._earlier = asyncio.Event()

    def __repr__(self) -> str:
        return f"Hedges({self.policy})"

    # ---- reports of the scheduler

    def sent(self, sequence: CallSequence, link: WorkerLink, cached_tokens: int, now: float) -> None:
        """Record that a sequence was sent to a worker. If its first token is late, the sequence may be sent to a
        second worker too. Sequences that may not have a second worker are ignored.

        `cached_tokens`: number of prompt tokens that the worker is expected to hold.
        """
        call = sequence.call
        if sequence.state is not State.SENT or len(call.sequences) > 1 or call.is_resumed:
            return
        if self.policy.share <= 0 or self._workers.count(call.model) < 2:
            return
        self._sequences[sequence.key] = sequence
        uncached = len(sequence.request.prompt_token_ids) - cached_tokens
        self.policy.sent(sequence.key, call.model, link.identity.worker_id, uncached, now)
        if self.policy.next_due < self._wakes_at:
            self._earlier.set()

    def answered(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Stop watching a sequence whose first output has arrived. `cached_tokens`: number of prompt tokens that were
        in the worker's cache."""
        if self._sequences.pop(sequence.key, None) is not None:
            uncached = len(sequence.request.prompt_token_ids) - cached_tokens
            self.policy.answered(sequence.key, uncached, self._clock())

    def forget(self, sequence: CallSequence) -> None:
        """Stop watching a sequence whose call has ended."""
        if self._sequences.pop(sequence.key, None) is not None:
            self.policy.forget(sequence.key)

    def ended(self, sequence: CallSequence, won: bool, computed_by: str) -> None:
        """Count a hedge that has ended. `won`: whether the second worker keeps the sequence. `computed_by`: incarnation
        of the worker that does not keep the sequence; "" if this worker has refused the sequence, so that it computed
        nothing."""
        model, accounts = sequence.call.model, self._accounts()
        if accounts is not None:
            accounts.hedge_ended(sequence, computed_by)
        now = self._clock()
        if won and (first := self.policy.worker_of(sequence.key)):
            self._fleets.record_late_lost(model, first, now)
        in_vain = self.policy.hedge_ended(sequence.key, won, now)
        self._metrics.count("hedges_total", model, "won" if won else "lost")
        if computed_by:
            self._metrics.count("wasted_tokens_total", model, "hedge", by=in_vain)

    # ---- time

    async def watch(self) -> None:
        """Send each sequence whose first token is late to a second worker too. Runs until cancelled."""
        while True:
            self._earlier.clear()
            self._wakes_at = self.policy.next_due
            wait_s = None if math.isinf(self._wakes_at) else max(self._wakes_at - self._clock(), LOOK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._earlier.wait()
            self.send_late()

    def send_late(self) -> None:
        """Handle the sequences whose first token is late now. Record their workers, so that routing picks these workers
        less often. Also send the sequences to second workers, as far as the policy allows."""
        now, in_vain = self._clock(), set[tuple[str, str, str]]()
        for key in self.policy.late(now):
            sequence = self._sequences[key]
            try:
                if sequence.state is State.SENT:
                    model, worker_id = sequence.call.model, self.policy.worker_of(key)
                    self._fleets.record_late(model, worker_id, now)
                    alike = model, worker_id, sequence.request.adapter
                    # When a worker hangs, many sequences are late at once; the others are not compared for each.
                    if alike not in in_vain and not self._hedge(sequence, now):
                        in_vain.add(alike)
            except Exception as error:
                sequence.call.fail_unexpectedly(error)

    def _hedge(self, sequence: CallSequence, now: float) -> bool:
        """Send a sequence whose first token is late to a second worker too, if the policy allows it. Return False if
        no other worker can take it now."""
        model, place = sequence.call.model, self._place(sequence)
        waiting = self._queues.waiting(model)[0]
        if place is None or not self.policy.may_hedge(sequence.key, waiting):
            return True
        candidates = self._candidates(sequence, now)
        cached = self._caches.cached_tokens(model, sequence.key, sequence.request)
        call = RouteCall(
            model,
            sequence.tokens,
            excluded=sequence.life.excluded | {sequence.life.last_worker},
            versions=sequence.call.versions.all,
            needs_tools=needs_parser(place.needs_tools, candidates),
            cached=cached or {},
            adapter=sequence.request.adapter,
        )
        decision = self.policy.second_worker(call, candidates)
        link = None if decision.worker_id is None else self._workers.link(model, decision.worker_id)
        if link is None:
            return False
        route = self._routes.create_hedge(decision, cached, sequence, link, now)
        if not submit_hedge(sequence, link, route, place, self._accounts(), decision.cached_tokens):
            return True
        self._routes.sent(sequence.call, route)
        uncached = sequence.tokens - decision.cached_tokens
        self.policy.hedged(sequence.key, link.identity.worker_id, uncached, now)
        self._breakers.record_sent(link.process, now)
        self._caches.expect(link, sequence.key, sequence.request, now)
        return True

    def _candidates(self, sequence: CallSequence, now: float) -> list[Candidate]:
        """Return the workers to which a late sequence may be sent too, because they would give the same answer as its
        first worker."""
        begun, model = sequence.life.compatibility, sequence.call.model
        return [
            candidate
            for candidate in self._workers.candidates(model, now, resumed=False)
            if (key := candidate.compatibility_key) is not None and begun is not None and key.can_resume(begun)
        ]
