"""The scheduler of a gateway. It queues the sequences of calls, sends sequences to workers, and queues sequences again
after the loss of a worker.

policy/scheduling decides which sequence goes to which worker. The scheduler asks the policy when something has changed,
and the executor carries out the policy's instructions.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.adapter_checks import AdapterChecks, QueuedAdapters
from cluster.gateway.scheduling.canary_statistics import CanaryStatistics
from cluster.gateway.scheduling.chat_renders import ChatRenders, small_room
from cluster.gateway.scheduling.executor import Executor
from cluster.gateway.scheduling.hedges import Hedges
from cluster.gateway.scheduling.moves import Moves
from cluster.gateway.scheduling.peer_backlog import BacklogReports
from cluster.gateway.scheduling.pump import SequencePump, UnservedModels
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.routes import Routes
from cluster.gateway.scheduling.sequence_events import SequenceEvents
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.upkeep import Upkeep
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.gateway.scheduling.workers import LinkedWorkers, ModelFleets
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.waiting_room import Order, WaitingRoom
from cluster.policy.routing.breaker import Breakers
from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.scheduling.hedging import HedgingPolicy
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.policy.scheduling.worker_losses import MOST_SILENT, WorkerLosses
from cluster.policy.scheduling.workers import Workers

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting
    from cluster.gateway.usage.open_accounts import OpenAccounts

log = structlog.get_logger("dispatch")

CLAIMED_NEEDS = 4
"""Number of needs for which capacity is claimed at a time, since each costs a look at all workers of the model."""
SLICE = 64
"""Number of sequences of one call that are queued at once, which takes about 3 ms."""


class SchedulerHost(Protocol):
    """The parts of a gateway that the scheduler uses."""

    @property
    def accounting(self) -> Accounting | None:
        """The gateway's accounts; None if the gateway keeps no accounts."""

    @property
    def directory(self) -> ModelDirectory:
        """Directory of the models that the gateway knows."""

    def gateway_count(self) -> int:
        """Return the number of the cluster's gateways; 0 if it is unknown."""

    def model_unserved(self) -> None:
        """Handle the first waiting call for a model that no worker serves. The controller may have to start a worker of
        the model."""

    def state_changed(self) -> None:
        """Handle a change of the models that the gateway can serve."""

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Return the ids of a model's calls that were resumed at this gateway, each with the number of its last resume
        (generation)."""


def _beside(policy: SchedulingPolicy, workers: LinkedWorkers, model: str) -> Mapping[str, int]:
    """Return how many of a model's new sequences had their turn and wait for each worker, by worker id. A sequence that
    any of several workers can serve counts for each of them. Of the needs for which sequences wait, the next
    CLAIMED_NEEDS count."""
    counts = Counter(policy.aside.counts(model))
    for need, count in policy.worker_waits.counts(model, CLAIMED_NEEDS).items():
        for worker_id in workers.serving(model, need):
            counts[worker_id] += count
    return counts


def _open_accounts(host: SchedulerHost) -> OpenAccounts | None:
    """Return the accounts of a gateway's submitted sequences whose usage records are not written yet; None if the
    gateway does no usage accounting."""
    return None if host.accounting is None else host.accounting.accounts


class Scheduler:
    """The scheduler of one gateway, for all models. It queues the sequences of calls and removes them again. Its parts
    do the rest: `pump` sends waiting sequences, `events` handles the events of sequences, and `upkeep` does the
    periodic work."""

    def __init__(
        self,
        host: SchedulerHost,
        room: WaitingRoom,
        charges: ServiceCharges,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        resume_wait_s: float = 30.0,
        max_silent_losses: int = MOST_SILENT,
        policy_of: Callable[[WaitingRoom, Workers, float, WorkerLosses], SchedulingPolicy] = SchedulingPolicy,
        render_room_of: Callable[[Callable[[str], Order]], WaitingRoom] = small_room,
        routing: RoutingSettings | None = None,
        hedging_share: float = 0.0,
    ) -> None:
        """`resume_wait_s`: longest wait, in seconds, of a sequence for a compatible worker. `max_silent_losses`: number
        of workers in a row that a sequence may lose before they send it a token. `policy_of` creates the policy, so
        that a test can wrap it. `render_room_of` creates the waiting room of the chats that wait to be rendered.
        `routing`: the policy for new calls. `hedging_share`: largest fraction of a model's sequences that may be
        hedged."""
        self.host = host
        self.charges = charges
        self.canaries = CanaryStatistics(metrics)
        self.breakers = Breakers()
        self.worker_caches = WorkerCaches()
        accounts = partial(_open_accounts, host)
        settings = routing or RoutingSettings()
        fleets = ModelFleets(host, settings)
        workers = LinkedWorkers(
            host, fleets, self.breakers, self.worker_caches, lambda key: self.queues.sequence(key).request, settings
        )
        self._links = workers.links
        self.routes = Routes(metrics, workers.count, clock)
        self.policy = policy_of(room, workers, resume_wait_s, WorkerLosses(max_silent_losses))
        self.queues = Queues(self.policy, charges, clock)
        self._unserved = UnservedModels(host.model_unserved)
        self.renders = ChatRenders(
            render_room_of,
            charges.weight_of,
            self.queues.tally,
            lambda name: host.directory.find(name),
            clock,
            self._unserved.note,
        )
        self.hedges = Hedges(
            HedgingPolicy(hedging_share, settings),
            self.queues,
            workers,
            fleets,
            self.worker_caches,
            self.breakers,
            metrics,
            self.routes,
            charges.place,
            accounts,
            clock,
        )
        self.moves = Moves(self.policy, self.queues, workers, clock)
        executor = Executor(
            self.queues,
            workers,
            self.worker_caches,
            self.breakers,
            self.hedges,
            metrics,
            self.routes,
            lambda: host.directory,
            accounts,
            clock,
        )
        self.backlogs = BacklogReports(
            charges,
            self.queues.waiting,
            self.policy.resuming,
            partial(_beside, self.policy, workers),
            workers.links,
            host.gateway_count,
            clock,
        )
        self.pump = SequencePump(self.policy, executor, self.backlogs, lambda: host.directory, clock)
        self.events = SequenceEvents(
            lambda name: host.directory.find(name),
            self.queues,
            charges,
            self.pump,
            self._unserved,
            self.worker_caches,
            self.routes,
            self.hedges,
            self.breakers,
            workers.links,
            metrics,
            accounts,
            clock,
        )
        queued = QueuedAdapters(self.queues, self.worker_caches, lambda name: host.directory.find(name))
        self.adapter_checks = AdapterChecks(self.queues.queued, queued.check)
        self.upkeep = Upkeep(
            lambda: host.directory,
            self.policy,
            self.queues,
            executor,
            self.pump,
            self._unserved,
            self.adapter_checks,
            fleets,
            self.worker_caches,
            self.breakers,
            charges,
            self.hedges,
            self.moves,
            self.renders,
            clock,
        )

    async def enter_in_slices(self, call: Call, model: KnownModel) -> None:
        """Do what `enter` does, for a call with many sequences: the sequences are queued in slices, and other tasks run
        between two slices."""
        starts_in_s = self._starts_in_s(call)
        for at in range(0, len(call.sequences), SLICE):
            if at:
                await asyncio.sleep(0)
            if call.error is not None:  # since the last slice
                raise call.error
            self.enter(call, model, call.sequences[at : at + SLICE], starts_in_s)

    def check_servable(self, call: Call, model: KnownModel) -> None:
        """Raise CallError if the model, or the call's adapter, can be served neither now nor later."""
        not_servable = queue_errors.not_servable(model, call.adapter)
        if not_servable is not None:
            raise not_servable

    def enter(
        self,
        call: Call,
        model: KnownModel,
        some: Sequence[CallSequence] | None = None,
        starts_in_s: float | None = None,
    ) -> None:
        """Queue every sequence of a call, and send the sequences for which a worker has capacity. Raises CallError if
        the model cannot be served or the waiting room refuses a sequence; then no sequence of the call is queued. The
        waiting room refuses no sequence of a resumed call.
        `some`: the sequences to queue; None for all. `starts_in_s`: lower bound on the wait, in seconds; None to
        compute it."""
        self.check_servable(call, model)
        if starts_in_s is None:
            starts_in_s = self._starts_in_s(call)
        sequences = call.sequences if some is None else some
        resumed: list[ResumingSequence] = []
        for sequence in sequences:
            if sequence.finish_reason:
                continue
            if sequence.emitted:  # at another gateway, where the sequence passed the waiting room
                resumed.append(self.queues.resume(sequence))
                continue
            self.queues.count(model.name, [sequence])
            if call.is_resumed:  # the call passed the waiting room before, and its resume tokens are used up
                self.queues.put_back(sequence)
                continue
            admitted = self.queues.admit(sequence, starts_in_s)
            for shed in admitted.shed:
                shed.call.fail(queue_errors.shed())
            if admitted.refusal is not None:
                self.leave(call)
                raise queue_errors.refused(admitted.refusal)
        if len(resumed) < len(sequences):
            self.pump.send_waiting(model.name)
        else:
            self.pump.send_resumed(model.name, resumed)
        self._unserved.note(model)

    def _starts_in_s(self, call: Call) -> float:
        """Return a lower bound, in seconds, on the wait of a new call. For a call without a deadline the wait does not
        matter, and 0 is returned."""
        if call.deadline is None:
            return 0.0
        return self.charges.statistics.starts_in_s(call.model, call.policy.flow, call.rank)

    def count_missed(self, call: Call, model: KnownModel) -> None:
        """Count a call as demand for the requested model, although a fallback model serves the call."""
        self.queues.count(model.name, call.sequences)
        self._unserved.note(model)

    def leave(self, call: Call) -> None:
        """End the sequences of a call, remove them from the queues, and correct their service charges to the actual
        cost."""
        waited = [self.queues.remove(sequence) for sequence in call.sequences]
        call.release()
        for sequence in call.sequences:
            try:
                self.queues.settle(sequence)
            except Exception:  # settle the other sequences' accounts all the same
                log.exception("call.sequence_not_settled", **call.log_fields)
            self.hedges.forget(sequence)
            self.moves.forget(sequence)
            self.charges.forget(sequence)
        if any(waited):  # others may have waited behind this call
            self.pump.send_waiting(call.model)
            self.backlogs.changed(call.model)

    def cut(self, call: Call) -> None:
        """Finish a call with the tokens that it has so far. Sequences that are still queued finish without tokens."""
        for sequence in call.sequences:
            self.queues.remove(sequence)
            sequence.cut()
        call.output.wake()

    def follow(self, call: Call) -> None:
        """Update the service charges of a running call by its output so far, and count this output as demand. Called a
        few times a second. Does nothing for a pooling call, whose sequences have no growing output."""
        if call.is_pooling:
            return
        for sequence in call.sequences:
            if sequence.finish_reason:
                self.queues.settle(sequence)
            elif (place := self.charges.grew(sequence)) is not None:
                self.queues.tally.record_output(place, len(sequence.emitted))

    def take_over(self, call: Call, generation: int) -> None:
        """Report to all workers of the model that this gateway has taken over a call by a resume. `generation`: the
        number of the resume. The workers then end the call's sequences of earlier generations."""
        for link in self._links(call.model):
            link.box.takeover(call.shown_id, generation)
