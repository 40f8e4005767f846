"""Simulated agents: sessions in which each turn extends the turn before, with a pause for tools between two turns.

Problem: the order within a tenant's queue matters only if three things hold: prompts are in caches, the caches are too
small, and turns wait. So the sessions grow, return after pauses and share the first tokens of their tenant, and the
workers have too few KV blocks for all sessions. The workers report stored and evicted blocks late. The waiting room,
the fair order, the cache index and the routing are the production code.

Method: a worker computes one prompt after the other at a constant rate, then decodes at a constant rate. It has a fixed
number of KV blocks. When they are all used, it evicts the idle block that was used longest ago.

Invariant: equal configurations give equal runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

import numpy as np

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.output_lengths import LearntMeans, LearntOutputs
from cluster.policy.fairness.token_cost import ServiceWeights
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.kv_cache.index import CacheIndex
from cluster.policy.kv_cache.prefix_hashes import Hashes
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import Build
from cluster.policy.scheduling.instructions import Send
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.worker_waits import Need
from cluster.worker.admission_window import LOOKAHEAD_SEQUENCES
from loadtests.sim.events import EventQueue

MODEL = "m"
BLOCK_TOKENS = 512
EXPECTED_S = 10.0
SAMPLE_S = 0.5


@dataclass(frozen=True, slots=True)
class SessionTenant:
    """A tenant with `sessions` agents. `pause_s`: median of the pause before a turn, in seconds."""

    name: str
    sessions: int
    weight: float
    pause_s: float


@dataclass(frozen=True, slots=True)
class SessionsConfig:
    """Configuration of a run. Lengths in tokens, times in seconds.

    `shared_tokens`: first tokens that all sessions of a tenant share. `first_tokens`: further tokens of the first turn.
    `new_tokens`: median of the tokens that a turn adds to its prompt. `output_tokens`: median length of an output.
    `start_s`: time within which all sessions begin. `kv_blocks`: number of KV blocks of each worker; a block has
    BLOCK_TOKENS tokens. `warm`: whether calls within a tenant's queue are sent in the warm order, which prefers prompts
    that a worker has cached (policy/fairness/warm_order.py); otherwise the order is first come, first served.
    """

    tenants: Sequence[SessionTenant]
    turns: int = 43
    shared_tokens: int = 10_000
    first_tokens: int = 2_000
    new_tokens: int = 2_200
    output_tokens: int = 370
    start_s: float = 120.0
    workers: int = 8
    slots: int = 16
    kv_blocks: int = 1_600
    prefill_tokens_per_s: float = 20_000.0
    token_s: float = 0.02
    events_late_s: tuple[float, float] = (0.05, 0.5)
    warm: bool = True
    seed: int = 1
    service: ServiceWeights = field(default_factory=ServiceWeights)


@dataclass(eq=False, slots=True)
class _Session:
    tenant: SessionTenant
    rng: Random
    """Random generator of this session alone, so that its lengths and pauses do not depend on the order of the
    calls."""
    tokens: int
    blocks: list[int]
    """Hashes of its blocks, including blocks of future tokens."""
    turns: int = 0


@dataclass(eq=False, slots=True)
class Turn:
    """One call of a session. `first` and `ended`: times of the first token and of the end; -1 until then. `cached`:
    number of prompt tokens found in the worker's cache."""

    waiting: WaitingSequence
    session: _Session
    blocks: list[int]
    output: int
    worker: int = -1
    cached: int = 0
    first: float = -1.0
    ended: float = -1.0


class SessionWorker:
    """A worker with a number of slots and a prefix cache of KV blocks. It computes one prompt at a time."""

    def __init__(self, config: SessionsConfig) -> None:
        self.config = config
        self.running = 0
        self.pending = 0
        """Number of running calls without output."""
        self.prefill_tokens = 0
        self.prefills_end = 0.0
        self.last_sent = 0.0
        self.tokens = self.most_tokens = 0
        """Tokens of the running calls with their whole outputs: now, and the most so far."""
        self.reported = 0.0
        """Time at which the worker's latest report reaches the gateway."""
        self._held: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no running call holds."""
        return self.config.kv_blocks - len(self._held)

    @property
    def free_sequences(self) -> int:
        """Number of calls that the gateway may send now. This is the number of free slots, less if prompts already wait
        in the engine (see worker/admission_window.py)."""
        window = LOOKAHEAD_SEQUENCES - self.pending if self.pending else 1 + LOOKAHEAD_SEQUENCES
        return max(min(self.config.slots - self.running, window), 0)

    def start(self, blocks: Sequence[int]) -> tuple[int, list[int]]:
        """Put the blocks of a call into the cache, and mark them as in use. Returns the number of leading blocks that
        were cached before, and the evicted blocks."""
        cached = 0
        for block in blocks:
            if block not in self._held and block not in self._idle:
                break
            cached += 1
        for block in blocks:
            self._idle.pop(block, None)
            self._held[block] = self._held.get(block, 0) + 1
        evicted = []
        while len(self._held) + len(self._idle) > self.config.kv_blocks and self._idle:
            evicted.append(self._idle.popitem(last=False)[0])
        return cached, evicted

    def end(self, blocks: Sequence[int]) -> None:
        """Release the blocks of a call. The last blocks are evicted first."""
        for block in reversed(blocks):
            if self._held[block] == 1:
                del self._held[block]
                self._idle[block] = None
            else:
                self._held[block] -= 1


class SessionWorld:
    """A run of sessions on one gateway. `turns` has all calls that have ended. Implements the protocol Workers of
    policy.scheduling."""

    def __init__(self, config: SessionsConfig) -> None:
        self.config = config
        self.event_queue = EventQueue()
        self.turns: list[Turn] = []
        self.service: dict[str, list[float]] = {tenant.name: [] for tenant in config.tenants}
        """Service of each tenant so far in weighted tokens, every SAMPLE_S."""
        self.backlogged: dict[str, list[bool]] = {tenant.name: [] for tenant in config.tenants}
        self.workers = [SessionWorker(config) for _ in range(config.workers)]
        weights = {tenant.name: tenant.weight for tenant in config.tenants}
        self.order = FairOrder(weight_of=weights.__getitem__, service=config.service)
        room = WaitingRoom(max_requests=10**6, max_tokens=10**12, max_wait_s=1e9, order_of=lambda model: self.order)
        self.policy = SchedulingPolicy(room, self, 1e9, WorkerLosses())
        self._rng = Random(config.seed)
        self._index = CacheIndex(1 << 20, config.seed)
        self._cached, self._outputs = LearntMeans(), LearntOutputs()
        self._calls: dict[str, Turn] = {}
        self._running: dict[str, Turn] = {}
        self._done = dict.fromkeys(weights, 0.0)
        self._serial = self._open = 0
        for at in range(config.workers):
            self._index.add_worker(str(at))
        for tenant in config.tenants:
            shared = [self._rng.getrandbits(64) for _ in range(config.shared_tokens // BLOCK_TOKENS)]
            for number in range(tenant.sessions):
                self._open += 1
                rng = Random(f"{config.seed} {tenant.name} {number}")
                session = _Session(tenant, rng, config.shared_tokens + config.first_tokens, list(shared))
                self.event_queue.at(rng.uniform(0, config.start_s), lambda s=session: self._arrive(s))  # type: ignore[misc]
        self.event_queue.every(SAMPLE_S, self._sample)
        self.event_queue.every(1.0, self._sweep)

    def run(self, most_s: float = 1e5) -> SessionWorld:
        """Run until all sessions have ended, but at most until the virtual time `most_s`, in seconds."""
        while self._open and self.event_queue.now < most_s:
            self.event_queue.run_until(self.event_queue.now + 10.0)
        return self

    # ---- figures

    def hit_rate(self) -> float:
        """Share of the prompt tokens that was found in a cache."""
        return sum(turn.cached for turn in self.turns) / sum(turn.waiting.tokens for turn in self.turns)

    def ttft_s(self, quantile: float) -> float:
        """Quantile of the time to first token over all calls, in seconds."""
        times = sorted(turn.first - turn.waiting.arrived for turn in self.turns)
        return times[min(int(quantile * len(times)), len(times) - 1)]

    def gap(self) -> float:
        """The fairness gap in units of U (see Observer.unit): the most service that a tenant gained on another while
        both had calls waiting. Service is in weighted tokens divided by the tenant's weight."""
        service = self.config.service
        longest = max(turn.waiting.tokens for turn in self.turns)
        running = max(worker.most_tokens for worker in self.workers)
        pairs = combinations(self.config.tenants, 2)
        return max(self._gap(a, b) for a, b in pairs) / max(service.input * longest, service.output * running)

    def _gap(self, one: SessionTenant, other: SessionTenant) -> float:
        largest = 0.0
        leads: list[float] = []
        waits = zip(self.backlogged[one.name], self.backlogged[other.name], strict=True)
        for at, both in enumerate(waits):
            lead = self.service[one.name][at] / one.weight - self.service[other.name][at] / other.weight
            leads = [min([*leads, lead]), max([*leads, lead])] if all(both) else []
            largest = max(largest, leads[1] - leads[0]) if leads else largest
        return largest

    # ---- a turn

    def _arrive(self, session: _Session) -> None:
        now, tenant, tokens = self.event_queue.now, session.tenant.name, session.tokens
        output = max(round(self.config.output_tokens * session.rng.lognormvariate(0, 0.6)), 2)
        while len(session.blocks) * BLOCK_TOKENS < tokens + output:
            session.blocks.append(session.rng.getrandbits(64))
        self._serial += 1
        waiting = WaitingSequence(
            call_id=str(self._serial),
            model=MODEL,
            tenant=tenant,
            tokens=tokens,
            deadline=None,
            priority_class="standard",
            arrived=now,
            cached_tokens=self._cached.mean(tenant, MODEL, tokens),
            output_tokens=self._outputs.expected(tenant, MODEL, 1 << 20),
        )
        self._calls[waiting.call_id] = Turn(waiting, session, list(session.blocks), output)
        self.policy.admit(waiting, now)
        self._pump()

    def _pump(self) -> None:
        for instruction in self.policy.assign(MODEL, self.event_queue.now):
            assert isinstance(instruction, Send)
            self._send(self._calls[instruction.entry.call_id], int(instruction.worker_id))

    def _send(self, turn: Turn, at: int) -> None:
        now, worker, tokens = self.event_queue.now, self.workers[at], turn.waiting.tokens
        self._index.expect(str(at), self._hashes(turn), now + EXPECTED_S)
        blocks, evicted = worker.start(turn.blocks)
        turn.worker, turn.cached = at, min(blocks, (tokens - 1) // BLOCK_TOKENS) * BLOCK_TOKENS
        new = tokens - turn.cached
        worker.running, worker.pending = worker.running + 1, worker.pending + 1
        worker.prefill_tokens, worker.last_sent = worker.prefill_tokens + new, now
        worker.prefills_end = max(worker.prefills_end, now) + new / self.config.prefill_tokens_per_s
        worker.tokens += tokens + turn.output
        worker.most_tokens = max(worker.most_tokens, worker.tokens)
        self._report(at, (), evicted)
        self.event_queue.at(worker.prefills_end, lambda: self._first_token(turn))

    def _first_token(self, turn: Turn) -> None:
        worker, waiting = self.workers[turn.worker], turn.waiting
        turn.first = self.event_queue.now
        worker.pending -= 1
        worker.prefill_tokens -= waiting.tokens - turn.cached
        self._running[waiting.call_id] = turn
        self._done[waiting.tenant] += self.config.service.prompt(waiting.tokens, turn.cached)
        self._cached.observe(waiting.tenant, MODEL, turn.cached)
        self.order.cached(waiting.call_id, turn.cached)
        self._report(turn.worker, turn.blocks[: waiting.tokens // BLOCK_TOKENS], ())
        self.event_queue.after(turn.output * self.config.token_s, lambda: self._end(turn))
        self._pump()

    def _end(self, turn: Turn) -> None:
        now, session, call_id = self.event_queue.now, turn.session, turn.waiting.call_id
        turn.ended = now
        worker = self.workers[turn.worker]
        worker.running -= 1
        worker.tokens -= turn.waiting.tokens + turn.output
        worker.end(turn.blocks)
        self._report(turn.worker, turn.blocks[: (turn.waiting.tokens + turn.output) // BLOCK_TOKENS], ())
        del self._running[call_id], self._calls[call_id]
        self._done[turn.waiting.tenant] += self.config.service.output * turn.output
        self._outputs.observe(turn.waiting.tenant, MODEL, turn.output)
        self.order.generated(call_id, turn.output)
        self.order.ended(call_id)
        self.turns.append(turn)
        session.turns += 1
        session.tokens += turn.output + max(round(self.config.new_tokens * session.rng.lognormvariate(0, 0.6)), 1)
        if session.turns == self.config.turns:
            self._open -= 1
        else:
            pause_s = session.tenant.pause_s * session.rng.lognormvariate(0, 1.0)
            self.event_queue.after(pause_s, lambda: self._arrive(session))
        self._pump()

    # ---- time

    def _report(self, at: int, stored: Sequence[int], removed: Sequence[int]) -> None:
        worker = self.workers[at]
        late_s = self._rng.uniform(*self.config.events_late_s)
        worker.reported = max(worker.reported, self.event_queue.now + late_s)

        def apply() -> None:
            self._index.remove(str(at), np.array(removed, np.uint64))
            self._index.store(str(at), np.array(stored, np.uint64))

        self.event_queue.at(worker.reported, apply)

    def _sample(self) -> None:
        now, service = self.event_queue.now, dict(self._done)
        for turn in self._running.values():
            tokens = min(int((now - turn.first) / self.config.token_s), turn.output)
            self.order.generated(turn.waiting.call_id, tokens)
            service[turn.waiting.tenant] += self.config.service.output * tokens
        waiting = {key.tenant for key in self.order.backlogs.own()}
        for tenant, value in service.items():
            self.service[tenant].append(value)
            self.backlogged[tenant].append(tenant in waiting)

    def _sweep(self) -> None:
        self.order.sweep(self.event_queue.now)
        self._index.maintain(self.event_queue.now, 16)

    # ---- policy.scheduling.workers.Workers

    def candidates(self, model: str, now: float, resumed: bool) -> list[Candidate]:
        """Return all workers."""
        return [self._candidate(at) for at in range(len(self.workers))]

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return the routing candidate for the worker with this incarnation."""
        return self._candidate(int(incarnation))

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Implements `Workers.route` (cluster/policy/scheduling/workers.py)."""
        return choose(call, self.candidates(call.model, now, False))

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a prompt each worker holds, by worker id."""
        matched = self._index.match(self._hashes(self._calls[key]))
        return {worker: blocks * BLOCK_TOKENS for worker, blocks in matched.items()}

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return the number of leading tokens of a call's prompt that each worker has cached, by worker id. These
        numbers are used only for the warm order, so the result is empty if `config.warm` is False."""
        return self.cached_tokens(model, key) if self.config.warm else {}

    def free_tokens(self, model: str, worker_id: str) -> int:
        """Return how many prompt tokens a worker can take in a new call; 0 if it can take no call."""
        worker = self.workers[int(worker_id)]
        return worker.free_blocks * BLOCK_TOKENS if worker.free_sequences else 0

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

    def _hashes(self, turn: Turn) -> Hashes:
        return np.array(turn.blocks[: (turn.waiting.tokens - 1) // BLOCK_TOKENS], np.uint64)

    def _candidate(self, at: int) -> Candidate:
        worker, blocks = self.workers[at], self.config.kv_blocks
        return Candidate(
            worker_id=str(at),
            model=MODEL,
            build=Build(),
            free_sequences=worker.free_sequences,
            free_tokens=worker.free_blocks * BLOCK_TOKENS,
            running=worker.running,
            waiting=0,
            kv_usage=1.0 - worker.free_blocks / blocks,
            healthy=True,
            draining=False,
            prefill_tokens=worker.prefill_tokens,
            incarnation=str(at),
            last_sent=worker.last_sent,
        )

    def __repr__(self) -> str:
        return f"SessionWorld({self.event_queue.now:g} s, {self._open} sessions)"
