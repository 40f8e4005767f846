"""Simulated gateway: the production code for scheduling, fair order and credits, without a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.api.types import CompatibilityKey, EngineRequest, TokenOutput
from cluster.policy.fairness.fair_queue import FairOrders
from cluster.policy.fairness.order import Order, WaitingSequence
from cluster.policy.fairness.output_lengths import LearntMeans, LearntOutputs
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import Build
from cluster.policy.scheduling.instructions import Send
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.worker_waits import Need
from cluster.wire.credit import CreditBalance, Grant
from loadtests.sim.fifo import FifoOrder
from loadtests.sim.worker import SimSubmit, SimWorker

MODEL = "m"


@dataclass(slots=True)
class SimCall:
    """State of one simulated call. `bound`, `first`, `ended`: times at which the call was assigned to a worker, had its
    first token, and ended; -1 before that."""

    waiting: WaitingSequence
    request: EngineRequest
    tenant: str
    arrived: float
    bound: float = -1.0
    first: float = -1.0
    ended: float = -1.0
    generated: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class GatewayCallbacks:
    """Callbacks of a gateway. Gateways and workers are given by their numbers.

    `bound(gateway, call)`: a call was bound to a worker. `served(call, output)`: a call has outputs. `submit(gateway,
    worker, call)`: send a call to a worker. `ack(gateway, worker, grant id)`: report that a grant was applied.
    """

    bound: Callable[[int, SimCall], None]
    served: Callable[[SimCall, TokenOutput], None]
    submit: Callable[[int, int, SimSubmit], None]
    ack: Callable[[int, int, int], None]


class SimGateway:
    """A simulated gateway. `fair`: the fair orders of the waiting calls; None for first come, first served."""

    def __init__(
        self,
        number: int,
        workers: Sequence[SimWorker],
        fair: FairOrders | None,
        service: ServiceWeights,
        callbacks: GatewayCallbacks,
    ) -> None:
        self.number = number
        self.fair = fair
        self.calls: dict[str, SimCall] = {}
        self.learnt = LearntOutputs()
        self._learnt_cached = LearntMeans()
        order_of: Callable[[str], Order] = (lambda model: FifoOrder()) if fair is None else fair.order
        room = WaitingRoom(max_requests=10**6, max_tokens=10**12, max_wait_s=1e9, order_of=order_of)
        self._policy = SchedulingPolicy(room, self, 1e9, WorkerLosses())
        self._workers = workers
        self._service = service
        self._balances = [CreditBalance() for _ in workers]
        self._running = [0] * len(workers)
        self._prefill_tokens = [0] * len(workers)
        self._callbacks = callbacks

    def enter(self, call: SimCall, now: float) -> None:
        """Admit a new call."""
        self.calls[call.waiting.call_id] = call
        self._policy.admit(call.waiting, now)
        self.pump(now)

    def granted(self, worker: int, grant: Grant, now: float) -> None:
        """Apply a credit grant of a worker."""
        self._balances[worker].apply_credit(grant.grant_id, grant.sequences, grant.tokens)
        self._callbacks.ack(self.number, worker, grant.grant_id)
        self.pump(now)

    def outputs(self, worker: int, outputs: Sequence[TokenOutput], now: float) -> None:
        """Process the outputs of one step of a worker."""
        order = self.fair.order(MODEL) if self.fair is not None else None
        for output in outputs:
            call = self.calls[output.request_id]
            call.generated += len(output.token_ids)
            if output.cached_tokens is not None:
                call.first, call.cached = now, output.cached_tokens
                self._prefill_tokens[worker] -= call.waiting.tokens
                self._learnt_cached.observe(call.tenant, MODEL, output.cached_tokens)
                if order is not None:
                    order.cached(output.request_id, output.cached_tokens)
            if order is not None:
                order.generated(output.request_id, call.generated)
            if output.finish is not None:
                call.ended = now
                self._running[worker] -= 1
                self.learnt.observe(call.tenant, MODEL, call.generated)
                del self.calls[output.request_id]
                if order is not None:
                    order.ended(output.request_id)

    def likely_cached(self, tenant: str, tokens: int) -> int:
        """Return the expected number of cached tokens in a prompt of a tenant."""
        return self._learnt_cached.mean(tenant, MODEL, tokens)

    def head(self) -> WaitingSequence | None:
        """The next sequence, or None if nothing waits."""
        return self._policy.room.head(MODEL)

    def waiting(self) -> int:
        """Return the number of waiting calls."""
        return self._policy.waiting(MODEL)[0]

    def claim(self) -> int:
        """Return the backlog that this gateway reports to the workers. With a fair order, the backlog is the gateway's
        share of the next turns, in the unit of `claimed_turns`. Without a fair order, it is the number of waiting
        calls."""
        return self.waiting() if self.fair is None else self.fair.order(MODEL).backlogs.claimed_turns()

    def pump(self, now: float) -> None:
        """Send waiting calls to workers, while a worker has capacity."""
        for instruction in self._policy.assign(MODEL, now):
            assert isinstance(instruction, Send), "no worker is lost in this simulation"
            self._bind(instruction.entry, int(instruction.worker_id), now)

    def _bind(self, waiting: WaitingSequence, worker: int, now: float) -> None:
        call = self.calls[waiting.call_id]
        call.bound = now
        self._balances[worker].spend(waiting.tokens)
        self._running[worker] += 1
        self._prefill_tokens[worker] += waiting.tokens
        charge = Charge(self._service, waiting.tokens, waiting.cached_tokens, waiting.output_tokens)
        flow = FlowKey(waiting.rank, waiting.tenant)
        self._callbacks.submit(self.number, worker, SimSubmit(call.request, flow, charge))
        self._callbacks.bound(self.number, call)

    # ---- policy.scheduling.workers.Workers

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Pick a worker."""
        return choose(call, self.candidates(call.model, now, False))

    def candidates(self, model: str, now: float, resumed: bool) -> list[Candidate]:
        """Return all workers."""
        return [self._candidate(at) for at in range(len(self._workers))]

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Return the routing candidate for the worker with this incarnation."""
        return self._candidate(int(incarnation))

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return nothing: the simulated gateway knows no KV blocks."""
        return {}

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return nothing: the simulated gateway knows no KV blocks."""
        return {}

    def free_tokens(self, model: str, worker_id: str) -> int:
        """Return the number of tokens in a worker's credit; 0 if the credit allows no further sequence."""
        free = self._balances[int(worker_id)].free
        return free.tokens if free.sequences > 0 else 0

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Return True: the simulated workers have all adapters that the calls name."""
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

    def _candidate(self, at: int) -> Candidate:
        free, worker = self._balances[at].free, self._workers[at]
        return Candidate(
            worker_id=str(at),
            model=MODEL,
            build=Build(),
            free_sequences=free.sequences,
            free_tokens=free.tokens,
            running=self._running[at],
            waiting=0,
            kv_usage=worker.kv_usage,
            healthy=True,
            draining=False,
            prefill_tokens=self._prefill_tokens[at],
            incarnation=str(at),
            adapters=worker.adapters,
            resident=frozenset() if worker.slots is None else worker.slots.resident,
        )

    def __repr__(self) -> str:
        return f"SimGateway({self.number}: {self._policy.room})"
