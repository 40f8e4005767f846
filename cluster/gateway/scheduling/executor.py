"""The executor, which carries out the instructions of the scheduling policy: it sends sequences to workers, and ends
calls whose sequences wait too long or can no longer be sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import structlog

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.models.adapters import name_of
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.adapter_checks import begun_adapter
from cluster.gateway.scheduling.hedges import Hedges
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.routes import Routes
from cluster.gateway.scheduling.submission import submit
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.gateway.scheduling.workers import LinkedWorkers
from cluster.observe.metrics import Metrics
from cluster.policy.routing.breaker import Breakers
from cluster.policy.scheduling.instructions import Acquit, End, Ending, Fail, Instruction, Send

if TYPE_CHECKING:
    from cluster.gateway.usage.open_accounts import OpenAccounts

log = structlog.get_logger("dispatch")


class Executor:
    """Carries out the instructions of one gateway's scheduling policy, for all models."""

    def __init__(
        self,
        queues: Queues,
        workers: LinkedWorkers,
        caches: WorkerCaches,
        breakers: Breakers,
        hedges: Hedges,
        metrics: Metrics,
        routes: Routes,
        directory: Callable[[], ModelDirectory],
        accounts: Callable[[], OpenAccounts | None],
        clock: Callable[[], float],
    ) -> None:
        """`accounts` returns the gateway's open accounts, or None if the gateway keeps no accounts."""
        self._queues = queues
        self._workers = workers
        self._caches = caches
        self._breakers = breakers
        self._hedges = hedges
        self._metrics = metrics
        self._routes = routes
        self._directory = directory
        self._accounts = accounts
        self._clock = clock

    def carry_out(self, instructions: Iterable[Instruction]) -> None:
        """Carry out instructions one by one. The next instruction is read only after the previous one is carried
        out."""
        for instruction in instructions:
            match instruction:
                case Send():
                    self._send(instruction)
                case Acquit(key):
                    self._queues.sequence(key).life.acquit()
                case Fail(key, error):
                    if (sequence := self._queues.left(key)) is not None:
                        sequence.call.fail_unexpectedly(error)
                case End(key, ending):
                    if (sequence := self._queues.left(key)) is not None and sequence.call.error is None:
                        self._end(sequence, ending)

    def _send(self, instruction: Send) -> None:
        entry = instruction.entry
        sequence = self._queues.left(entry.call_id)
        if sequence is None:
            return
        link = self._workers.link(entry.model, instruction.worker_id)
        if link is None:  # a fault of the policy; the sequence has left its queue and must not be lost silently
            sequence.call.fail_unexpectedly(LookupError(f"worker {instruction.worker_id} is not linked"))
            return
        now = self._clock()
        try:
            self._resolve_adapter(sequence)
        except Exception as error:  # must not end the link whose event is handled here
            sequence.call.fail_unexpectedly(error)
            return
        route = self._routes.create(instruction, sequence, link, now)
        versions = sequence.call.versions
        sequence.set_route(route)
        fresh, cached = instruction.uncached_tokens, instruction.cached_tokens
        if submit(sequence, link, entry, self._accounts(), now, fresh, cached):
            self._breakers.record_sent(link.process, now)
            self._caches.expect(link, sequence.key, sequence.request, now)
            self._hedges.sent(sequence, link, instruction.cached_tokens, now)
            self._metrics.count("route_decisions_total", entry.model, instruction.reason)
            self._routes.sent(sequence.call, route)
            if sequence.call.versions != versions and len(sequence.call.sequences) > 1:
                self._queues.versions_changed(sequence.call)

    def _resolve_adapter(self, sequence: CallSequence) -> None:
        """Set the digest of the adapter in a request that was made before the digest was known. If another sequence of
        the call has begun, its digest is used, since the outputs of a call must not come from different files."""
        if not (name := name_of(sequence.request.adapter)):
            return
        digest = begun_adapter(sequence)
        known = self._directory().find(sequence.call.model)
        if (not digest or name_of(digest)) and known is not None:
            digest = known.adapters.digest(name)
        if digest and not name_of(digest):
            sequence.call.set_adapter(sequence, digest)
            self._caches.forget_prompt(sequence.key)

    def _end(self, sequence: CallSequence, ending: Ending) -> None:
        call, tokens = sequence.call, len(sequence.emitted)
        if ending is Ending.BLAMED:
            log.warning("call.blamed", **call.log_fields, lost=sequence.life.loss.links)
            call.blame(queue_errors.blamed(tokens, len(sequence.life.loss.links)))
        else:
            call.fail(self._error(call, tokens, ending))

    def _error(self, call: Call, tokens: int, ending: Ending) -> CallError:
        if ending is Ending.REPLACED:
            return queue_errors.replaced(tokens)
        is_late = call.deadline is not None and self._clock() >= call.deadline
        if ending is Ending.NOT_RESUMED:
            return queue_errors.not_resumed(tokens, is_late)
        if ending is Ending.NO_ADAPTER:
            return queue_errors.no_adapter(call.shown_model)
        if ending is Ending.NO_VERSION:
            return queue_errors.no_version(call.shown_model)
        return queue_errors.too_late(call.model, self._directory().find(call.model), is_late, call.adapter)
