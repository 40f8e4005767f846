"""The call service, which carries a call from arrival to end, for all APIs. The file follows the order of a call's
steps: `open` first, then the steps that `open` takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.bodies import Bodies
from cluster.gateway.auth.authenticator import Authenticator, NoAuthentication
from cluster.gateway.call_undo import UndoSteps, close_guards
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_context import CallContext
from cluster.gateway.calls.call_opening import CallOpening
from cluster.gateway.calls.cleanup import Cleanup
from cluster.gateway.calls.keepalive import KeepAlives
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.open_calls import OpenCalls
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_opening import PoolingOpening
from cluster.gateway.calls.pooling.pooling_request import PoolingRequest
from cluster.gateway.calls.records.access_log import AccessLog
from cluster.gateway.calls.records.end_metrics import EndMetrics
from cluster.gateway.calls.records.trace_facts import call_facts
from cluster.gateway.calls.sequences.life import Life
from cluster.gateway.calls.tokenization import Tokenization, worker_renderer
from cluster.gateway.calls.unread_answers import UnreadAnswer, UnreadAnswers
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.observe.metrics import Metrics
from cluster.policy.scheduling.worker_losses import MOST_SILENT

if TYPE_CHECKING:
    from cluster.gateway.guards.guards import Guards
    from cluster.gateway.resume_tokens.resumption import ResumeService
    from cluster.gateway.tracing.tracer import Tracer
    from cluster.gateway.usage.prompt_log import PromptLog


class CallService:
    """Opens the calls of one gateway. Each call is an async context manager. At its exit the slots of the call are
    freed, the call leaves the queue, and its accounts and metrics are settled."""

    def __init__(
        self,
        directory: ModelDirectory,
        scheduler: Scheduler,
        reservations: QuotaReservations,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        authenticator: Authenticator | None = None,
        max_attempts: int = 3,
        guards: Guards | None = None,
        max_silent_losses: int = MOST_SILENT,
        resumes: ResumeService | None = None,
        prompts: PromptLog | None = None,
        access_log: AccessLog | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`max_attempts`: number of workers on which a sequence may fail before its call fails. `max_silent_losses`:
        number of workers that a sequence may lose in a row without a token in between. `guards`: required if a tenant's
        policy names guards. `resumes`: the resume service; None if streams cannot be resumed. `prompts`: the log of
        prompts, for tenants whose policy asks for it. `access_log`: None if ended calls are not logged. `tracer`: None
        if calls are not traced."""
        self.authenticator: Authenticator = authenticator if authenticator is not None else NoAuthentication()
        self.directory = directory
        self.bodies = Bodies()
        self.unread_answers = UnreadAnswers()
        self.clock = clock
        self.calls = OpenCalls(self.authenticator.tenant_error, clock)
        self.authenticator.on_change.add(self.calls.end_suspended)
        self._renderer_of = partial(worker_renderer, scheduler.renders, scheduler.charges.rank_of)
        self.tokenization = Tokenization(directory, reservations, self._renderer_of)
        self.authenticator.on_change.add(partial(scheduler.renders.end_suspended, self.authenticator.tenant_error))
        self.calls.on_close.add(scheduler.renders.close)
        self.keepalives = KeepAlives(self.calls, scheduler, directory, clock)
        # Operations on all open calls, under the names that the gateway process and the admin API call.
        self.statistics, self.abort, self.send_keepalives = self.calls.statistics, self.calls.abort, self.keepalives.run
        self.close, self.hand_over, self.end_all = self.calls.close, self.calls.hand_over, self.calls.end_all
        self.resumes = resumes
        self._new_life = partial(Life, max_attempts, max_silent_losses)
        self._guards = guards
        self._reservations = reservations
        self._scheduler = scheduler
        self._metrics = metrics
        self._end_metrics = EndMetrics(metrics, directory, scheduler.queues.tally, clock)
        self._access_log = access_log
        self._tracer = tracer
        self._at_end: list[Callable[[Opening | PoolingOpening, Outcome], None]] = []
        """Functions that are called for each call that has ended or could not begin. The last function in the list is
        called first."""
        if tracer is not None:
            self._at_end.append(self._end_trace)
        if access_log is not None:
            self._at_end.append(access_log.record)
        self._at_end.append(self._end_metrics.count)
        self._undo = UndoSteps(self.calls, reservations, scheduler, prompts)

    def call_at_end(self, function: Callable[[Opening | PoolingOpening, Outcome], None]) -> None:
        """Register a function that is called for each call that has ended or could not begin. Functions are called in
        the order of registration. The function must be short."""
        self._at_end.insert(0, function)

    @property
    def busy(self) -> bool:
        """Whether at least one call is open."""
        return self.calls.busy

    # ---- one call, from arrival to end

    async def count(self, meta: CallMeta) -> None:
        """Count a request against its tenant's limits, whatever the outcome of its call. Called before the body is
        read. Raises CallError RATE_LIMITED if a limit is exceeded."""
        try:
            await self._reservations.count_request(meta.principal.tenant)
        except CallError as error:
            if self._access_log is not None:
                self._access_log.refused(meta, error.outcome)
            raise
        meta.counted = True

    def open(
        self, request: requests.GenerationRequest, meta: CallMeta, unread: UnreadAnswer | None = None
    ) -> CallContext[Opening, Call]:
        """Return the async context manager in which a call is open. Entering it raises CallError if the call cannot
        run. An error that is raised inside it ends the call, and determines the outcome of the call. `unread`: counts
        the answer; None if its chunks are sent at once or it has only text."""
        opening = Opening(meta, self.clock(), request, unread)
        self._trace(opening, meta.traceparent)
        return CallContext(opening, self._begin, self._at_end, self.clock)

    def open_pooling(
        self, request: PoolingRequest, meta: CallMeta, unread: UnreadAnswer | None = None
    ) -> CallContext[PoolingOpening, PoolingCall]:
        """Open a call for a pooling request, which asks for vectors or scores and not for generated tokens. The result
        is used like the result of `open`."""
        opening = PoolingOpening(meta, self.clock(), request, unread)
        self._trace(opening, meta.traceparent)
        return CallContext(opening, self._begin_pooling, self._at_end, self.clock)

    def _trace(self, opening: CallOpening, traceparent: str) -> None:
        """Begin the record of a call's spans, if the call is sampled. `traceparent`: the caller's trace context or, for
        a resumed call, the trace context of the call at its first gateway."""
        if self._tracer is not None:
            opening.begin_trace(self._tracer, traceparent)

    def _end_trace(self, opening: Opening | PoolingOpening, outcome: Outcome) -> None:
        """Export the spans of a call if the call is sampled."""
        if self._tracer is not None and opening.trace is not None:
            self._tracer.ended(opening.trace, call_facts(opening, outcome, self.clock()))

    async def _begin(self, opening: Opening, cleanup: Cleanup) -> Call:
        """Turn a request into a queued call, step by step. Each step registers its undo step with `cleanup`."""
        self.calls.check_not_closing()
        if opening.request.resume is not None:
            await opening.read_resume_tokens(self._resume_service())
            if opening.chain is not None and opening.chain.traceparent and not opening.meta.traceparent:
                self._trace(opening, opening.chain.traceparent)
        requests.check_options(opening.request.options)
        if opening.request.metadata:
            requests.check_metadata(opening.request.metadata)
        opening.choose_model(self.directory)
        await opening.encode(self.directory, self._renderer_of)
        opening.meta.release_body()
        if opening.meta.principal.tenant.guards:
            await self._guard_prompt(opening, cleanup)
        call = opening.create_call(self._scheduler, self.authenticator, self._metrics, self.clock, self._new_life)
        if opening.unread is not None:
            max_tokens = call.sequences[0].request.sampling.max_tokens
            tokens = self._scheduler.charges.learnt.p95(call.policy.flow, call.model, max_tokens)
            await opening.unread.hold(opening.answer_bytes(tokens))
            self.calls.check_not_closing()
        if (suspended := self.authenticator.tenant_error(opening.meta.tenant)) is not None:  # since the call arrived
            raise suspended
        self._hold_open(call, opening, cleanup)
        if (resumes := self.resumes) is not None and opening.request.resumable:
            cleanup.add(call, (resumes.give_up, lambda call, outcome: resumes.leave(call)))
            resumes.begin(call, opening.request, opening.meta, opening.bundle_digest, opening.chain)
        await self._reserve(call, opening, cleanup)
        if opening.chain is not None:
            self._scheduler.check_servable(call, opening.model)  # a refusal after this would use up the resume tokens
            await self._resume_service().take_over(call, opening.chain)
        cleanup.add(call, self._undo.schedule)
        if call.trace is not None:
            call.trace.queued()
        self._scheduler.enter(call, opening.model)
        return call

    async def _begin_pooling(self, opening: PoolingOpening, cleanup: Cleanup) -> PoolingCall:
        """Turn a pooling request into a queued call, as `_begin` does for other requests."""
        self.calls.check_not_closing()
        if opening.request.metadata:
            requests.check_metadata(opening.request.metadata)
        opening.choose_model(self.directory)
        if opening.unread is not None:
            await opening.unread.hold(opening.answer_bytes)
            self.calls.check_not_closing()
        await self._reservations.charge(opening.meta.principal.tenant, opening.prepaid_tokens)
        await opening.encode(self.directory)
        if not opening.keeps_cut_texts:  # otherwise the text counts in the budget of request bytes until the call ends
            opening.meta.release_body()
        if opening.meta.principal.tenant.guards:
            await self._guard_prompt(opening, cleanup)
        if (suspended := self.authenticator.tenant_error(opening.meta.tenant)) is not None:  # since the call arrived
            raise suspended
        call = opening.create_call(self._scheduler, self.clock)
        self._hold_open(call, opening, cleanup)
        await opening.create_sequences(self.authenticator, self._new_life)
        await self._reserve(call, opening, cleanup)
        cleanup.add(call, self._undo.schedule)
        if call.trace is not None:
            call.trace.queued()
        await self._scheduler.enter_in_slices(call, opening.model)
        return call

    async def _reserve(self, call: Call, opening: CallOpening, cleanup: Cleanup) -> None:
        """Reserve the quota of a call until the call ends."""
        cleanup.add(call, self._undo.quota)
        await self._reservations.admit(call)
        if opening.is_fallback:
            call.add_headers([("x-headrace-model", call.shown_model)])
        if call.error is not None:  # the tenant was suspended while its limits were checked
            raise call.error

    def _resume_service(self) -> ResumeService:
        if self.resumes is None:
            raise CallError(Outcome.UNSUPPORTED_FEATURE, "this gateway cannot resume streams: send a new call")
        return self.resumes

    async def _guard_prompt(self, opening: Opening | PoolingOpening, cleanup: Cleanup) -> None:
        """Apply the tenant's guards to the prompt. Guards search the whole prompt. They run after the prompt was
        encoded, because the encoding bounds the prompt's length."""
        assert self._guards is not None, "a policy names guards, but the service has none"
        guards = opening.create_guards(self._guards)
        cleanup.add(guards, (close_guards,))
        await opening.guard_prompt(guards)

    def _hold_open(self, call: Call, opening: Opening | PoolingOpening, cleanup: Cleanup) -> None:
        """Register the call as open until the call ends."""
        cleanup.add(opening, self._undo.close)
        self.calls.add(call)
        if opening.is_fallback:
            self._record_fallback(call, opening)

    def _record_fallback(self, call: Call, opening: CallOpening) -> None:
        """Count a call that a fallback model serves: in the metrics, and as demand for the model that was requested."""
        self._scheduler.count_missed(call, opening.requested)
        self._metrics.count("route_decisions_total", opening.requested.name, "fallback")
