"""A journal of a gateway's scheduling policy. It records each call of the gateway to the policy and each result. The
recorded calls can be replayed on another policy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.api.types import CompatibilityKey
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import RoomAdmission, WaitingRoom
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.routing.version_split import ANY_VERSION, Versions
from cluster.policy.scheduling.instructions import End, Instruction, Move, ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.worker_waits import Need
from cluster.policy.scheduling.workers import Workers


@dataclass
class Journal:
    """The recorded events of one policy, in order.

    `events`: calls, answers, changes of a fair order and changes of the recent losses of workers, each as a pair (kind,
    arguments). `reads`: each question of the policy about workers, with the answer.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    reads: list[tuple[Any, Any]] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Return the number of events of a kind."""
        return sum(event[0] == kind for event in self.events)


class RecordedOrder(FairOrder):
    """A fair order that records each change that is made directly to it. Changes that the waiting room makes are not
    recorded here."""

    def __init__(self, journal: Journal, model: str, weight_of: Callable[[str], float]) -> None:
        super().__init__(weight_of=weight_of)
        self._journal = journal
        self._model = model

    def cached(self, call_id: str, cached_tokens: int) -> None:
        """Implements `FairOrder.cached`."""
        self._journal.events.append(("order", (self._model, "cached", (call_id, cached_tokens))))
        super().cached(call_id, cached_tokens)

    def generated(self, call_id: str, output_tokens: int) -> None:
        """Implements `FairOrder.generated`."""
        self._journal.events.append(("order", (self._model, "generated", (call_id, output_tokens))))
        super().generated(call_id, output_tokens)

    def ended(self, call_id: str) -> None:
        """Implements `FairOrder.ended`."""
        self._journal.events.append(("order", (self._model, "ended", (call_id,))))
        super().ended(call_id)

    def revoked(self, call_id: str) -> None:
        """Implements `FairOrder.revoked`."""
        self._journal.events.append(("order", (self._model, "revoked", (call_id,))))
        super().revoked(call_id)

    def sweep(self, now: float) -> None:
        """Implements `FairOrder.sweep`."""
        self._journal.events.append(("order", (self._model, "sweep", (now,))))
        super().sweep(now)


class _RecordedWorkers:
    """Workers whose answers are recorded."""

    def __init__(self, journal: Journal, workers: Workers) -> None:
        self._journal = journal
        self._workers = workers

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Implements `Workers.route`. Records the candidate workers, not the decision, so that a replay decides anew.
        Cached tokens are not recorded: the prompts of these tests are too short to be looked up in the workers'
        caches."""
        answer = list(self._workers.candidates(call.model, now, False))
        self._journal.reads.append(((call, now), answer))
        return self._workers.route(call, now)

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Implements `Workers.candidates`."""
        answer = list(self._workers.candidates(model, now, resumed))
        self._journal.reads.append(((model, now, resumed), answer))
        return answer

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Implements `Workers.candidate`."""
        answer = self._workers.candidate(model, incarnation, now)
        self._journal.reads.append(((model, incarnation, now), answer))
        return answer

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int] | None:
        """Implements `Workers.cached_tokens`."""
        answer = self._workers.cached_tokens(model, key)
        self._journal.reads.append(((model, key), answer))
        return answer

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Implements `Workers.held_tokens`."""
        answer = self._workers.held_tokens(model, key)
        self._journal.reads.append(((model, key, "held"), answer))
        return answer

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Implements `Workers.free_tokens`."""
        answer = self._workers.free_tokens(model, worker_id)
        self._journal.reads.append(((model, worker_id, "free"), answer))
        return answer

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Implements `Workers.has_adapter`."""
        answer = self._workers.has_adapter(model, adapter)
        self._journal.reads.append(((model, adapter, "adapter"), answer))
        return answer

    def has_version(self, model: str, need: Need) -> bool:
        """Implements `Workers.has_version`."""
        answer = self._workers.has_version(model, need)
        self._journal.reads.append(((model, need), answer))
        return answer

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Implements `Workers.runs_suspect`."""
        answer = self._workers.runs_suspect(model, incarnation)
        self._journal.reads.append(((model, incarnation, "suspect"), answer))
        return answer

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Implements `Workers.is_replaced`."""
        answer = self._workers.is_replaced(model, compatibility)
        self._journal.reads.append(((model, compatibility), answer))
        return answer


class _ReplayedWorkers:
    """Workers that give the recorded answers. Each question must equal the recorded question."""

    def __init__(self, journal: Journal) -> None:
        self.reads = deque(journal.reads)

    def _answer(self, question: tuple[object, ...]) -> Any:
        recorded, answer = self.reads.popleft()
        assert question == recorded
        return answer

    def route(self, call: RouteCall, now: float) -> RoutingDecision:
        """Implements `Workers.route`. The decision is computed from the recorded workers."""
        return choose(call, self._answer((call, now)))

    def candidates(self, model: str, now: float, resumed: bool) -> Sequence[Candidate]:
        """Implements `Workers.candidates`."""
        return self._answer((model, now, resumed))  # type: ignore[no-any-return]

    def candidate(self, model: str, incarnation: str, now: float) -> Candidate | None:
        """Implements `Workers.candidate`."""
        return self._answer((model, incarnation, now))  # type: ignore[no-any-return]

    def cached_tokens(self, model: str, key: str) -> Mapping[str, int] | None:
        """Implements `Workers.cached_tokens`."""
        return self._answer((model, key))  # type: ignore[no-any-return]

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Implements `Workers.held_tokens`."""
        return self._answer((model, key, "held"))  # type: ignore[no-any-return]

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Implements `Workers.free_tokens`."""
        return self._answer((model, worker_id, "free"))  # type: ignore[no-any-return]

    def has_adapter(self, model: str, adapter: str) -> bool:
        """Implements `Workers.has_adapter`."""
        return self._answer((model, adapter, "adapter"))  # type: ignore[no-any-return]

    def has_version(self, model: str, need: Need) -> bool:
        """Implements `Workers.has_version`."""
        return self._answer((model, need))  # type: ignore[no-any-return]

    def runs_suspect(self, model: str, incarnation: str) -> bool:
        """Return the recorded result of `Workers.runs_suspect`."""
        return self._answer((model, incarnation, "suspect"))  # type: ignore[no-any-return]

    def is_replaced(self, model: str, compatibility: CompatibilityKey | None) -> bool:
        """Implements `Workers.is_replaced`."""
        return self._answer((model, compatibility))  # type: ignore[no-any-return]


class _RecordedLosses(WorkerLosses):
    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    def lost(self, link: str, now: float, unreachable: str = "") -> None:
        """Implements `WorkerLosses.lost`."""
        self._journal.events.append(("lost", (link, now, unreachable)))
        super().lost(link, now, unreachable)

    def returned(self, incarnation: str) -> None:
        """Implements `WorkerLosses.returned`."""
        self._journal.events.append(("returned", (incarnation,)))
        super().returned(incarnation)


class RecordedPolicy(SchedulingPolicy):
    """A scheduling policy that records its calls and answers."""

    def __init__(self, journal: Journal, room: WaitingRoom, workers: Workers, resume_wait_s: float) -> None:
        super().__init__(room, _RecordedWorkers(journal, workers), resume_wait_s, _RecordedLosses(journal))
        self._journal = journal
        self._assigning = False

    def _say(self, kind: str, *values: object) -> None:
        self._journal.events.append((kind, values))

    def admit(
        self, entry: WaitingSequence, now: float, starts_in_s: float = 0.0, versions: Versions = ANY_VERSION
    ) -> RoomAdmission:
        """Implements `SchedulingPolicy.admit`."""
        self._say("admit", entry, now, starts_in_s, versions)
        admission = super().admit(entry, now, starts_in_s, versions)
        self._say("answer", admission)
        return admission

    def put_back(self, entry: WaitingSequence, now: float, versions: Versions = ANY_VERSION) -> None:
        """Implements `SchedulingPolicy.put_back`."""
        self._say("put_back", entry, now, versions)
        super().put_back(entry, now, versions)

    def resume(self, sequence: ResumingSequence, now: float) -> None:
        """Implements `SchedulingPolicy.resume`."""
        self._say("resume", sequence, now)
        super().resume(sequence, now)

    def remove(self, key: str) -> bool:
        """Implements `SchedulingPolicy.remove`."""
        self._say("remove", key)
        removed = super().remove(key)
        self._say("answer", removed)
        return removed

    def expire(self, now: float, longer_s: Callable[[str], float]) -> list[End]:
        """Implements `SchedulingPolicy.expire`. `longer_s` is ignored: the extra waiting time is 0 for every model."""
        self._say("expire", now)
        ends = super().expire(now, lambda model: 0.0)
        self._say("answer", ends)
        return ends

    def set_versions(self, key: str, versions: Versions) -> None:
        """Implements `SchedulingPolicy.set_versions`."""
        self._say("set_versions", key, versions)
        super().set_versions(key, versions)

    def assign(self, model: str, now: float) -> Iterator[Instruction]:
        """Implements `SchedulingPolicy.assign`."""
        self._say("assign", model, now)
        self._assigning = True
        for instruction in super().assign(model, now):
            self._say("instruction", instruction)
            yield instruction
        self._assigning = False
        self._say("end")

    def assign_resumed(self, model: str, sequences: Iterable[ResumingSequence], now: float) -> Iterator[Instruction]:
        """Implements `SchedulingPolicy.assign_resumed`."""
        if self._assigning:  # a part of `assign`
            yield from super().assign_resumed(model, sequences, now)
            return
        sequences = list(sequences)
        self._say("assign_resumed", model, sequences, now)
        for instruction in super().assign_resumed(model, sequences, now):
            self._say("instruction", instruction)
            yield instruction
        self._say("end")

    def movable(self, sequences: Iterable[ResumingSequence], worker_id: str, now: float) -> Iterator[Move]:
        """Implements `SchedulingPolicy.movable`."""
        sequences = list(sequences)
        self._say("movable", sequences, worker_id, now)
        for move in super().movable(sequences, worker_id, now):
            self._say("instruction", move)
            yield move
        self._say("end")


def replay(
    journal: Journal,
    policy_of: Callable[[Callable[[str], FairOrder], Workers], SchedulingPolicy],
    weight_of: Callable[[str], float],
) -> None:
    """Repeat the recorded calls on another policy, and compare each answer and each instruction.

    `policy_of` creates the other policy from fair orders and workers.
    """
    orders: dict[str, FairOrder] = {}

    def order_of(model: str) -> FairOrder:
        return orders.setdefault(model, FairOrder(weight_of=weight_of))

    workers = _ReplayedWorkers(journal)
    policy = policy_of(order_of, workers)
    running: list[Iterator[object]] = []
    answer: object = None
    for number, (kind, values) in enumerate(journal.events):
        match kind:
            case "answer":
                assert answer == values[0], number
            case "instruction":
                assert next(running[-1]) == values[0], number
            case "end":
                assert next(running.pop(), None) is None, number
            case "assign" | "assign_resumed" | "movable":
                running.append(getattr(policy, kind)(*values))
            case "lost" | "returned":
                getattr(policy.losses, kind)(*values)
            case "order":
                model, name, arguments = values
                getattr(order_of(model), name)(*arguments)
            case "expire":
                answer = policy.expire(values[0], lambda model: 0.0)
            case "admit" | "remove":
                answer = getattr(policy, kind)(*values)
            case _:
                getattr(policy, kind)(*values)
    assert not running
    assert not workers.reads
