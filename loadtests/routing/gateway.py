"""Simulated gateway that routes by cached prefix.

Scheduling policy, waiting room, cache index and credit balances are the production code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.order import Order, WaitingSequence
from cluster.policy.fairness.output_lengths import LearntMeans, LearntOutputs
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.index import CacheIndex
from cluster.policy.routing.hot_prefixes import HotPrefixes
from cluster.policy.routing.prefill_times import PrefillTimes
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import Build
from cluster.policy.scheduling.hedging import HedgingPolicy
from cluster.policy.scheduling.instructions import Send
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.worker_waits import Need
from cluster.wire.credit import CreditBalance, Grant
from loadtests.routing.calls import BLOCK_TOKENS, RoutedCall
from loadtests.routing.policies import Picker, Prefix

MODEL = "m"
EXPECTED_S = 10.0
"""Same value as gateway.scheduling.worker_caches.EXPECTED_S."""
INDEX_BLOCKS = 1 << 18


@dataclass(eq=False, slots=True)
class _Link:
    """A gateway's knowledge of one worker. For each call without output, `prefill` has the prompt tokens to compute and
    `sent_at` the time of the Submit. `last_first`: time of the latest first token of any call."""

    balance: CreditBalance = field(default_factory=CreditBalance)
    running: int = 0
    prefill: dict[str, int] = field(default_factory=dict)
    prefill_tokens: int = 0
    sent_at: dict[str, float] = field(default_factory=dict)
    last_first: float = 0.0
    waiting: int = 0
    kv_usage: float = 0.0
    last_sent: float = 0.0
    resident: frozenset[str] = frozenset()
    """Adapters in the slots of the engine."""


class RoutingGateway:
    """A simulated gateway.

    `carry_out(call, worker)` submits a call, `cancel(call, worker)` aborts a call. `claim(calls)` reports the number of
    waiting calls to the workers. `slots`: number of sequences that a worker runs at once. `knows_blocks`: whether the
    gateway keeps a cache index. `hedger`: the gateway's hedging policy. `adapters`: the adapters that all workers have
    loaded.
    """

    def __init__(
        self,
        number: int,
        workers: int,
        picker_of: Callable[[Prefix], Picker],
        order_of: Callable[[str], Order],
        carry_out: Callable[[RoutedCall, int], None],
        claim: Callable[[int], None],
        slots: int,
        knows_blocks: bool,
        hedger: HedgingPolicy,
        cancel: Callable[[RoutedCall, int], None] = lambda call, worker: None,
        adapters: frozenset[str] = frozenset(),
    ) -> None:
        self._adapters = adapters
        self.number = number
        self._slots = slots
        self.calls: dict[str, RoutedCall] = {}
        self.index = CacheIndex(INDEX_BLOCKS, 0x9E3779B97F4A7C15 + 2 * number)
        self._times = PrefillTimes()
        self._links = [_Link() for _ in range(workers)]
        self._carry_out = carry_out
        self._claim = claim
        self._claimed = 0
        self._now = 0.0
        self._hedger = hedger
        self._cached, self._outputs = LearntMeans(), LearntOutputs()
        self._cancel = cancel
        self._knows_blocks = knows_blocks
        self._head: RoutedCall | None = None
        room = WaitingRoom(max_requests=10**6, max_tokens=10**12, max_wait_s=1e9, order_of=order_of)
        self._picker = picker_of(self._first_block)
        self._hot = HotPrefixes()
        self.policy = SchedulingPolicy(room, self, 1e9, WorkerLosses())

    # ---- calls

    def enter(self, call: RoutedCall, now: float) -> None:
        """Admit a call."""
        self.calls[call.call_id] = call
        prompt = call.prompt
        waiting = WaitingSequence(
            call_id=call.call_id,
            model=MODEL,
            tenant=prompt.tenant,
            tokens=prompt.prompt_tokens,
            deadline=None,
            priority_class="standard",
            arrived=now,
            cached_tokens=self._cached.mean(prompt.tenant, MODEL, prompt.prompt_tokens),
            output_tokens=self._outputs.expected(prompt.tenant, MODEL, 1 << 20),
            adapter=prompt.adapter,
        )
        self.policy.admit(waiting, now)
        self.pump(now)

    def pump(self, now: float) -> None:
        """Send waiting calls while a worker has capacity."""
        self._now = now
        for instruction in self.policy.assign(MODEL, now):
            if not isinstance(instruction, Send):
                raise RuntimeError(f"a call was not sent: {instruction}")
            self._bind(instruction, now)
        waiting = self.waiting
        if (waiting > 0) != (self._claimed > 0):
            self.claim_now()

    def claim_now(self) -> None:
        """Report the number of waiting calls, if it has changed."""
        if self.waiting != self._claimed:
            self._claimed = self.waiting
            self._claim(self._claimed)

    @property
    def waiting(self) -> int:
        """Number of waiting calls."""
        return self.policy.waiting(MODEL)[0]

    def _bind(self, send: Send, now: float) -> None:
        call, worker = self.calls[send.entry.call_id], int(send.worker_id)
        call.bound, call.worker, call.reason = now, worker, send.reason
        call.predicted = (send.cached or {}).get(send.worker_id, 0)
        uncached = self._send(call, worker, call.predicted, now)
        self._hedger.sent(call.call_id, MODEL, send.worker_id, uncached, now)

    def _send(self, call: RoutedCall, worker: int, cached: int, now: float) -> int:
        """Send a call to a worker; return how many tokens the worker will probably compute."""
        link = self._links[worker]
        link.balance.spend(call.prompt.prompt_tokens)
        link.running += 1
        link.last_sent = now
        if call.prefix is not None:
            self._hot.record(call.prefix, now)
        link.prefill[call.call_id] = uncached = max(call.prompt.prompt_tokens - cached, 1)
        link.prefill_tokens += uncached
        link.sent_at[call.call_id] = now
        if self._knows_blocks:
            self.index.expect(str(worker), call.prompt.stored_hashes, now + EXPECTED_S)
        self._carry_out(call, worker)
        return uncached

    # ---- hedging

    @property
    def next_due(self) -> float:
        """Time at which `hedge` is to be called; infinity if no call is needed."""
        return self._hedger.next_due

    def hedge(self, now: float) -> None:
        """Send each call whose first token is late to a second worker too, where the hedging policy allows it."""
        for key in list(self._hedger.late(now)):
            link = self._links[self.calls[key].worker]
            since = max(next(iter(link.sent_at.values()), now), link.last_first)
            self._times.record_unfinished(str(self.calls[key].worker), link.prefill_tokens, now - since, now)
            if not self._hedger.may_hedge(key, self.waiting):
                continue
            call, cached = self.calls[key], self.cached_tokens(MODEL, key)
            request = RouteCall(
                MODEL, call.prompt.prompt_tokens, excluded=frozenset((str(call.worker),)), cached=cached,
                adapter=call.prompt.adapter,
            )  # fmt: skip
            decision = self._hedger.second_worker(request, self.candidates(MODEL, now, resumed=False))
            if decision.worker_id is not None:
                call.was_hedged, call.second = True, int(decision.worker_id)
                uncached = self._send(call, call.second, cached.get(decision.worker_id, 0), now)
                self._hedger.hedged(key, decision.worker_id, uncached, now)

    def _settle(self, call: RoutedCall, winner: int, now: float) -> None:
        """End the hedge of a call, that is, its submission to a second worker. The call stays on the worker `winner`,
        which answered first, and is aborted on the other worker."""
        loser = call.worker if winner == call.second else call.second
        link = self._links[loser]
        link.running -= 1
        uncached = link.prefill.pop(call.call_id)
        link.prefill_tokens -= uncached
        del link.sent_at[call.call_id]
        if winner == call.second:
            self._times.record_unfinished_lost(str(loser), now)
        self._hedger.hedge_ended(call.call_id, winner == call.second, now)
        call.worker, call.second = winner, -1
        self._cancel(call, loser)

    def _computed(self, worker: int, call_id: str, uncached: int, now: float) -> None:
        """Record how long a worker took for a prompt, as the production code in gateway.links.slots does."""
        link = self._links[worker]
        since = max(link.sent_at.pop(call_id), link.last_first)
        link.last_first = now
        self._times.record(str(worker), max(uncached, 1), now - since, now)

    # ---- links

    def join(self, worker: int) -> None:
        """Add a worker. Its blocks are unknown until its snapshot arrives."""
        self.index.add_worker(str(worker))

    def granted(self, worker: int, grant: Grant, now: float) -> None:
        """Apply a credit grant."""
        self._links[worker].balance.apply_credit(grant.grant_id, grant.sequences, grant.tokens)
        self.pump(now)

    def reported(self, worker: int, waiting: int, kv_usage: float) -> None:
        """Apply the load in a heartbeat of a worker."""
        link = self._links[worker]
        link.waiting, link.kv_usage = waiting, kv_usage

    def set_resident(self, worker: int, adapters: frozenset[str]) -> None:
        """Set the adapters in the slots of a worker's engine."""
        self._links[worker].resident = adapters

    def owns(self, worker: int, call_id: str) -> bool:
        """Return whether the gateway uses a worker's outputs for a call. It does not if the call has ended, or if
        another worker has won the call's hedge."""
        call = self.calls.get(call_id)
        return call is not None and (call.worker == worker or call.second == worker)

    def first_output(self, worker: int, call_id: str, cached: int, now: float) -> None:
        """Record the first token of a call."""
        call = self.calls[call_id]
        call.answered_by.add(worker)
        if call.second >= 0:
            self._settle(call, worker, now)
        self._hedger.answered(call_id, call.prompt.prompt_tokens - cached, now)
        link = self._links[call.worker]
        call.first, call.cached = now, cached
        self._cached.observe(call.prompt.tenant, MODEL, cached)
        link.prefill_tokens -= link.prefill.pop(call_id)
        self._computed(call.worker, call_id, call.prompt.prompt_tokens - cached, now)

    def ended(self, call_id: str, now: float) -> RoutedCall:
        """Record the end of a call; return the call."""
        call = self.calls.pop(call_id)
        self._links[call.worker].running -= 1
        call.ended = now
        self._outputs.observe(call.prompt.tenant, MODEL, call.prompt.output_tokens)
        call.generated = call.prompt.output_tokens
        return call

    def apply(self, worker: int, change: KvChange) -> None:
        """Apply a worker's report of changed blocks."""
        name = str(worker)
        if not self._knows_blocks:
            return
        if change.is_reset:
            self.index.add_worker(name)
        self.index.remove(name, change.removed)
        self.index.store(name, change.stored)

    # ---- policy.scheduling.workers.Workers

    def candidates(self, model: str, now: float, resumed: bool) -> list[Candidate]:
        """Return all workers."""
        return [self._candidate(at) for at in range(len(self._links))]

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return the worker whose number is `incarnation`."""
        return self._candidate(int(incarnation))

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return, by worker, the number of leading prompt tokens of a call that the worker's cache holds, as far as the
        gateway knows. `key`: the id of the call."""
        return {worker: blocks * BLOCK_TOKENS for worker, blocks in self._matched(self.calls[key]).items()}

    def _matched(self, call: RoutedCall) -> Mapping[str, int]:
        matched = self.index.match(call.prompt.hashes) if self._knows_blocks else {}
        call.prefix = int(call.prompt.hashes[max(matched.values()) - 1]) if matched else None
        return matched

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a prompt each worker holds, by worker id. Returns the same as
        `cached_tokens`."""
        return self.cached_tokens(model, key)

    def free_tokens(self, model: str, worker_id: str) -> int:
        """Return how many prompt tokens a worker can take now."""
        free = self._links[int(worker_id)].balance.free
        return free.tokens if free.sequences > 0 else 0

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Pick a worker for a new call by this gateway's policy."""
        head = self._head = self.calls[call.call_id]
        if head.prefix is not None:
            call = replace(call, sharing=self._hot.recent(head.prefix, now))
        return self._picker(call, self.candidates(call.model, now, resumed=False))

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Implements `Workers.has_adapter` (cluster/policy/scheduling/workers.py)."""
        return True

    def has_version(self, model: str, need: Need) -> bool:
        """Implements `Workers.has_version`: all workers are of one version."""
        return True

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Return False: no worker is ever lost, so no sequence is suspect."""
        return False

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Return False: no worker is ever lost, so none is replaced."""
        return False

    def _first_block(self) -> int:
        """Return a name for the routed prompt: the hash of its first blocks, or 0 for a prompt without whole blocks."""
        hashes = self._head.prompt.hashes if self._head is not None else ()
        return int(hashes[min(len(hashes), 8) - 1]) if len(hashes) else 0

    def _candidate(self, at: int) -> Candidate:
        link = self._links[at]
        free = link.balance.free
        return Candidate(
            worker_id=str(at),
            model=MODEL,
            build=Build(),
            free_sequences=free.sequences,
            free_tokens=free.tokens,
            running=link.running,
            waiting=link.waiting,
            kv_usage=link.kv_usage,
            healthy=True,
            draining=False,
            prefill_tokens=link.prefill_tokens,
            incarnation=str(at),
            last_sent=link.last_sent,
            unanswered=len(link.prefill),
            slots=self._slots,
            slowdown=self._times.slowdown(str(at), self._now),
            adapters=self._adapters,
            resident=link.resident,
        )

    def __repr__(self) -> str:
        return f"RoutingGateway({self.number}: {self.waiting} wait, {len(self.calls)} calls)"
