"""Workers, sequences and a gateway's part for tests of the scheduling policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import Build
from cluster.policy.scheduling.instructions import Instruction, Send
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.worker_waits import Need

MAX_WAIT_S = 10.0
KEYS = [CompatibilityKey(f"weights {name}", "bundle", "class") for name in "ab"]


@dataclass
class Fleet:
    """A set of workers for tests, all of the model "m". `workers` holds them by incarnation. Implements the protocol
    Workers."""

    workers: dict[str, Candidate] = field(default_factory=dict)
    replaced: set[CompatibilityKey | None] = field(default_factory=set)
    cached: dict[str, dict[str, int]] = field(default_factory=dict)
    with_suspect: set[str] = field(default_factory=set)
    broken: bool = False

    def add(
        self, name: str, free: int = 1, key: CompatibilityKey = KEYS[0], version: str = "", adapters: str = ""
    ) -> None:
        """Add a worker. `free`: number of sequences that it can take. `adapters`: one letter for each adapter that it
        has."""
        self.workers[name] = Candidate(
            name, "m", Build(version), free, 1000 * free, 0, 0, 0.0, True, False, incarnation=name,
            compatibility_key=key, prefill_budget=8192, block_size=16, adapters=frozenset(adapters),
        )  # fmt: skip

    def grant(self, name: str, free: int) -> None:
        """Set the number of further sequences that a worker can take."""
        self.workers[name] = replace(self.workers[name], free_sequences=free, free_tokens=1000 * free)

    def spend(self, name: str) -> None:
        """Lower by one the number of sequences that a worker can still take."""
        self.grant(name, self.workers[name].free_sequences - 1)

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Implements `Workers.route`."""
        return choose(call, self.candidates(call.model, now, False))

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Implements `Workers.candidates`."""
        if self.broken:
            raise ValueError("broken")
        return list(self.workers.values())

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Implements `Workers.candidate`."""
        return self.workers.get(incarnation)

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Implements `Workers.cached_tokens`."""
        return self.cached.get(key, {})

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Implements `Workers.held_tokens`."""
        return self.cached.get(key, {})

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Implements `Workers.free_tokens`."""
        worker = self.workers.get(worker_id)
        return None if worker is None else worker.free_tokens if worker.free_sequences > 0 else 0

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Implements `Workers.has_adapter`."""
        return any(adapter in worker.adapters for worker in self.workers.values())

    def has_version(self, model: str, need: Need) -> bool:
        """Implements `Workers.has_version`."""
        return any(need.allows(worker.build) for worker in self.workers.values())

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Implements `Workers.runs_suspect`."""
        return incarnation in self.with_suspect

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Implements `Workers.is_replaced`."""
        return compatibility in self.replaced


def policy_of(fleet: Fleet, max_silent_losses: int = 2, max_tokens: int = 10_000) -> SchedulingPolicy:
    """Return a policy with a fair order and a large waiting room."""
    orders: dict[str, FairOrder] = {}
    room = WaitingRoom(
        max_requests=100,
        max_tokens=max_tokens,
        max_wait_s=MAX_WAIT_S,
        order_of=lambda model: orders.setdefault(model, FairOrder()),
    )
    return SchedulingPolicy(room, fleet, MAX_WAIT_S, WorkerLosses(max_silent_losses))


def entry(
    key: str, tenant: str = "t", deadline: float | None = None, rank: int = 0, adapter: str = ""
) -> WaitingSequence:
    """Return the entry of a sequence of ten tokens."""
    return WaitingSequence(key, "m", tenant, 10, deadline, "standard", 0.0, rank, adapter=adapter)


def carry_out(policy: SchedulingPolicy, fleet: Fleet, now: float) -> list[Instruction]:
    """Carry out all instructions as a gateway does, and return the instructions."""
    done = []
    for instruction in policy.assign("m", now):
        done.append(instruction)
        if isinstance(instruction, Send):
            fleet.spend(instruction.worker_id)
    return done


def sent(instructions: Sequence[Instruction]) -> list[tuple[str, str]]:
    """Return (sequence, worker) for each Send instruction."""
    return [(one.entry.call_id, one.worker_id) for one in instructions if isinstance(one, Send)]
