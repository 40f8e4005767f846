"""The Submits of all links. A Submit is a gateway's message that starts a request. The worker runs the request
on the engine, or refuses it. If the request still runs after the loss of its former gateway (a detached
request), the worker connects it to the new gateway instead.

A request id inside the engine consists of gateway incarnation, epoch, slot and attempt, because a repeated
id would end vLLM's engine core. If one request fails, its link and the link's other requests continue.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineDead, EngineRefused
from cluster.api.types import EngineRequest
from cluster.link.v1 import link_pb2 as pb
from cluster.process.call_errors import is_call_failure
from cluster.wire.codecs import codec
from cluster.wire.dial import LinkEnded
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.adapters.loads import AdapterLoads
from cluster.worker.engine_runner import EngineRunner
from cluster.worker.link import Link
from cluster.worker.link_credit import LinkCredit
from cluster.worker.request_outputs import RunningRequest
from cluster.worker.resume_generations import ResumeGenerations, call_of
from cluster.worker.running_requests import RunningRequests

log = structlog.get_logger("worker")

INLINE_PROMPT_BYTES = 16_384
TAKEN_OVER = "the call was resumed elsewhere: its stream goes on there"


@dataclass(frozen=True, slots=True)
class Submits:
    """Starts and aborts the gateways' requests, and knows the newest generation of each resumed call."""

    runner: EngineRunner
    requests: RunningRequests
    served: ServedReports
    credit: LinkCredit
    adapters: AdapterLoads
    _generations: ResumeGenerations = field(default_factory=ResumeGenerations)

    async def accept(self, link: Link, submit: pb.Submit) -> None:
        """Submit a small request at once, and any other request in a new task.

        A request is not small if it has a long prompt, a grammar, parsing, or an adapter that must be loaded first.
        """
        if submit.slot in link.requests:
            raise LinkEnded(f"the gateway used slot {submit.slot} for two requests")
        # The Submit is recorded before a task begins, because an abort may follow in the same message.
        request_id = f"{link.incarnation}-{link.number}-{submit.slot}-{submit.attempt}"
        link.begin_submit(submit.slot, request_id)
        takes_time = submit.sampling.HasField("grammar") or submit.HasField("parsing")
        # The adapter may be unloaded during a take-over.
        takes_time = takes_time or bool(submit.adapter and submit.generation)
        takes_time = takes_time or not self.adapters.is_held(submit.adapter)
        if takes_time or submit.prompt_blob or len(submit.prompt_ids) > INLINE_PROMPT_BYTES:
            link.spawn(self._submit(link, submit, request_id))
        else:
            await self._submit(link, submit, request_id)

    async def abort(self, link: Link, slots: Sequence[int]) -> None:
        """Abort the requests in these slots of a link.

        A request whose Submit is in progress is aborted when the Submit finishes.
        """
        await self.runner.abort([request_id for slot in slots if (request_id := self._cancel(link, slot))])
        self.credit.regrant()

    async def take_over(self, call: str, generation: int) -> None:
        """Record that a call was resumed. If `generation` is new, abort the call's requests of older generations."""
        older = self.requests.of_call(call, generation) if self._generations.record(call, generation) else []
        to_abort = []
        for link, slot in older:
            if request_id := self._cancel(link, slot):
                to_abort.append(request_id)
            link.outbox.refused(slot, Outcome.CANCELLED.name, TAKEN_OVER, "")
        await self.runner.abort(to_abort)
        self.credit.regrant()

    def _cancel(self, link: Link, slot: int) -> str | None:
        request_id = link.request_to_abort(slot)
        if request_id is not None:
            self.requests.forget(request_id, Outcome.CANCELLED)
        return request_id

    async def _submit(self, link: Link, submit: pb.Submit, request_id: str) -> None:
        """Run the request of a Submit, or refuse it."""
        slot, received_at = submit.slot, time.monotonic()
        ids = submit.prompt_ids
        if submit.prompt_blob:
            ids = await link.prompts.pop_prompt(submit.prompt_blob)
        self.credit.record_submit(link.credit_order, submit, ids)
        try:
            request = codec.submit_from_pb(submit, request_id, ids)
        except Exception as error:
            link.refuse(slot, Outcome.INTERNAL.name, f"the gateway's Submit cannot be read: {error}")
            return
        try:
            await self._run(link, submit, request, received_at)
        except EngineRefused as refused:
            self._withdraw(request_id, Outcome.INVALID_FIELD)
            link.refuse(slot, refused.reason, refused.message, refused.field)
        except EngineDead as dead:
            self.runner.report_dead(dead)
        except BaseException as error:
            if not is_call_failure(error):
                raise
            log.exception("worker.request_failed", request=request_id, trace_id=request.traceparent[3:35])
            self._withdraw(request_id, Outcome.INTERNAL)
            self.runner.abort_in_background([request_id])
            why = f"the worker failed on this request: {type(error).__name__}"
            link.refuse(slot, Outcome.INTERNAL.name, why)
        if link.finish_submit(slot):
            await self.abort(link, [slot])

    async def _run(self, link: Link, submit: pb.Submit, request: EngineRequest, received_at: float) -> None:
        """Run the request of a Submit. If the request still runs on the engine as a detached request, connect it to the
        new gateway; otherwise submit it to the engine. Raises EngineRefused and EngineDead."""
        if submit.generation:
            await self.take_over(call_of(submit.stream), submit.generation)
        if request.parsing is not None or request.sampling.grammar is not None:
            request = await self.runner.parser.open(request)
        running = await self._new_request(link, submit, request, received_at)
        reattached, to_abort = self.requests.reattach(running, submit)
        if not reattached:
            to_abort += self.requests.start(running, request.request_id, submit)
        if to_abort:
            self.runner.abort_in_background(to_abort)
        if reattached:
            self.credit.regrant()
            return
        await self.runner.engine.submit(request)
        running.accept()

    async def _new_request(
        self, link: Link, submit: pb.Submit, request: EngineRequest, received_at: float
    ) -> RunningRequest:
        """Return the record of a new request. The request keeps its adapter loaded until the record is forgotten."""
        try:
            await self._hold(link, submit.slot, request)
        except BaseException:
            self.runner.parser.close(request.request_id)
            raise
        if self._generations.is_outdated(submit.stream, submit.generation):
            self.adapters.release(request.adapter)
            self.runner.parser.close(request.request_id)
            raise EngineRefused(Outcome.CANCELLED.name, TAKEN_OVER)
        return self.requests.new_request(link, submit, request, received_at)

    async def _hold(self, link: Link, slot: int, request: EngineRequest) -> None:
        """Wait until a request's adapter is loaded, and keep it loaded for the request.

        During the wait, capacity is reserved for the request (RunningRequests.expect), and an abort ends the request at
        once.
        """
        if self.adapters.is_held(request.adapter):
            await self.adapters.hold(request.adapter)
            return
        tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        with self.requests.expect(tokens):
            await link.wait(slot, self.adapters.hold(request.adapter))

    def _withdraw(self, request_id: str, outcome: Outcome) -> None:
        """Forget a request that the engine has not accepted."""
        self.served.revoked(request_id)
        self.requests.forget(request_id, outcome)
        self.credit.regrant()
