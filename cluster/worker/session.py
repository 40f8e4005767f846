"""The worker's side of its links: run Submits from all gateways on one engine and send back each step's outputs.

The engine loop never awaits a link (outbox.py). When a link ends, its requests are aborted in the engine and the
gateway decides what happens to the calls. Requests that another gateway may resume run on for a moment
(detached_requests.py). A request id inside the engine consists of gateway incarnation, epoch, slot and attempt, since a
repeated id is fatal inside vLLM's engine core.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import zlib
from collections.abc import Coroutine, Sequence

import structlog

from cluster.api.demand import ComputedWork
from cluster.api.outcomes import Outcome
from cluster.api.ports import Engine, EngineDead, EngineRefused
from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, WorkerIdentity
from cluster.http2.client import ClientCall
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.process.call_errors import is_call_failure
from cluster.wire import codec
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bulk import send_bundle, serve_bulk
from cluster.wire.bundle import Bundle
from cluster.wire.credit import CreditGranter
from cluster.wire.dial import HeartbeatSender, LinkEnded, Timing, open_channel, open_client, read, wait_first
from cluster.wire.ended_requests import UsageKeeper
from cluster.wire.outbox import Outbox
from cluster.wire.tls import TlsFiles
from cluster.worker.drain_state import DrainStates
from cluster.worker.gpu_meter import GpuMeter
from cluster.worker.resume_generations import call_of
from cluster.worker.running_requests import RunningRequests, credit_used
from cluster.worker.served_reports import ServedReports
from cluster.worker.session_state import LinkState, WorkerStatistics
from cluster.worker.usage import WorkerUsage

log = structlog.get_logger("worker")

INLINE_PROMPT_BYTES = 16_384
_EPOCHS = (1 << 32) - 1
REPORT_S = 0.1
GATEWAY_SILENT_S = 1.0
"""Seconds of silence after which a gateway counts as lost for the calls resumed from it. Ten beats come each second."""
TAKEN_OVER = "the call was resumed elsewhere: its stream goes on there"
TURN_METHOD = "/cluster.link.v1.Link/Turn"
USAGE_ACK_S = 5.0
"""Seconds that a drained worker waits for the acknowledgement of its last usage records."""
END_REASON_S = 0.5
"""Seconds that a worker with an ended engine waits for its gateways to read the reason and close their links.

If the worker closed a link first, the reset would overtake the reason.
"""


class WorkerSession:
    """A session that serves one started engine to every gateway in `gateways` and the gateways' siblings.

    `gateways` are `host:port` addresses. The session lasts until it is closed.
    """

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        engine: Engine,
        info: EngineInfo,
        bundle: Bundle,
        gateways: Sequence[str],
        tls: TlsFiles | None = None,
        timing: Timing | None = None,
        outbox_tokens: int = 65_536,
        gpus: float = 0.0,
        gpu: str = "",
        keeper: UsageKeeper | None = None,
        idle_report_s: float = 60.0,
    ) -> None:
        """Create a session; `run` serves the engine.

        `outbox_tokens`: number of token ids that may wait for one gateway before its link is closed.
        `gpus`, `gpu`: number and type of the replica's GPUs, for the ledger.
        `idle_report_s`: seconds between two reports of the idle time of the GPUs.
        """
        self._identity = identity
        self._engine = engine
        self._info = info
        self._bundle = bundle
        self._gateways = GatewayAddresses(gateways)
        self._tls = tls
        self._timing = timing or Timing()
        self._outbox_tokens = outbox_tokens
        self._granter = CreditGranter()
        self._links: dict[int, LinkState] = {}
        self._busy_s = 0.0
        self._epochs = itertools.count(1)
        self._steps = 0
        meter = GpuMeter(gpus, info.max_num_batched_tokens, time.monotonic())
        self._usage = WorkerUsage(
            identity.incarnation, keeper or UsageKeeper(), meter, gpu, idle_report_s, lambda: self._requests.shares()
        )
        self._served = ServedReports()
        self._requests = RunningRequests(info, meter, self._served, self._usage, self._is_gateway_lost)
        self._drain_state = DrainStates(lambda: (link.outbox for link in self._links.values()))
        self._drains: set[asyncio.Task[bool]] = set()
        self._abort_tasks: set[asyncio.Task[None]] = set()
        self._load = EngineLoad()
        self._closed = asyncio.Event()
        self._engine_ended = ""
        self._unlinked = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the worker's counts."""
        kept = self._usage.statistics()
        return WorkerStatistics(
            len(self._links),
            self._requests.running,
            self._requests.tokens,
            self._steps,
            self._granter.promised(),
            kept.kept,
            kept.dropped,
            len(self._requests.detached),
        )

    async def run(self) -> None:
        """Serve until `close`. Raises EngineDead once the engine is lost, after every link is closed."""
        self._failed = asyncio.get_running_loop().create_future()
        work: list[asyncio.Future[None]] = [
            self._failed,
            asyncio.create_task(self._engine_loop()),
            asyncio.create_task(self._until_closed()),
            asyncio.create_task(self._gateways.dial(self._session, self._timing)),
            asyncio.create_task(self._usage.run()),
            asyncio.create_task(self._report_served()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            failures = [part.exception() for part in done if not part.cancelled()]
            await self._report_end(next((str(error) for error in failures if isinstance(error, EngineDead)), ""))
            for part in done:
                part.result()
        finally:
            for part in work:
                part.cancel()
            self._end_drains()
            await asyncio.gather(*work, *self._drains, *self._abort_tasks, return_exceptions=True)
            with contextlib.suppress(EngineDead):
                await self._engine.abort(self._requests.detached.expired(math.inf))

    async def _until_closed(self) -> None:
        await self._closed.wait()

    async def drain(self, timeout_s: float, leaving: bool = True) -> bool:
        """Take no new work and wait for the running requests; return False if some still run after `timeout_s`.

        `leaving`: whether the process ends afterwards, so that uncordon cannot undo the drain.
        """
        self._drain_state.drain(time.monotonic(), timeout_s, leaving)
        try:
            async with asyncio.timeout(timeout_s):
                await self._requests.idle.wait()
        except TimeoutError:
            return False
        await self._usage.flush(min(timeout_s, USAGE_ACK_S))
        self._drain_state.mark_drained(time.monotonic())
        return True

    async def close(self, engine_ended: str = "") -> None:
        """End every link, so that `run` returns. `engine_ended`: why the engine has ended, sent to the gateways."""
        self._engine_ended = self._engine_ended or engine_ended
        self._closed.set()

    async def _report_end(self, why: str) -> None:
        """If the engine has ended, send every gateway the reason and wait for the gateways to close their links."""
        self._engine_ended = self._engine_ended or why
        if not self._engine_ended or not self._links:
            return
        for link in self._links.values():
            link.outbox.engine_ended(self._engine_ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_REASON_S):
                await self._unlinked.wait()

    # ---- engine

    async def _engine_loop(self) -> None:
        while True:
            outputs = await self._engine.step()
            self._steps += 1
            touched, to_abort = self._requests.apply_step(outputs)
            if to_abort:
                await self._abort_requests(to_abort)
            self._load = self._engine.load()
            self._busy_s += self._load.step_s
            self._regrant()
            for link in touched:
                link.outbox.load(self._load)
                link.outbox.flush()

    async def _report_served(self) -> None:
        """Report served tokens to every gateway and abort expired detached requests, every REPORT_S seconds.

        Neither the report nor the abort is done for each token.
        """
        while True:
            await asyncio.sleep(REPORT_S)
            self._served.report(self._requests.output_tokens())
            if expired := self._requests.detached.expired(time.monotonic()):
                log.info("detached_requests_dropped", requests=len(expired))
                await self._abort_requests(expired)
                self._regrant()

    def _regrant(self) -> None:
        if not self._drain_state.serves:
            return
        for grant in self._granter.new_grants(*self._requests.capacity()):
            link = self._links[grant.link & _EPOCHS]
            link.outbox.grant(grant)
            link.grant_id = grant.grant_id
            if link.unacked_since is None:
                link.unacked_since = time.monotonic()

    # ---- one session with one gateway

    async def _session(self, address: str) -> None:
        if self._engine_ended:
            raise LinkEnded("the engine has ended")
        epoch = next(self._epochs)
        async with open_client(address, self._tls) as client, open_channel(address, self._tls) as bulk_channel:
            call = client.call(
                TURN_METHOD, pb.WorkerTurn.SerializeToString, pb.GatewayTurn.FromString, self._metadata()
            )
            await call.write(pb.WorkerTurn(hello=codec.hello_to_pb(self._identity, self._info, epoch)))
            try:
                async with asyncio.timeout(self._timing.welcome_s):
                    first = await read(call)
            except TimeoutError:
                raise LinkEnded(f"no welcome within {self._timing.welcome_s} s") from None
            if first is None or not first.HasField("welcome"):
                raise LinkEnded("the gateway did not welcome this worker")
            link = LinkState(
                epoch,
                self._credit_order(epoch, first.welcome.incarnation),
                first.welcome.gateway_id,
                first.welcome.incarnation,
                Outbox(self._outbox_tokens),
            )
            log.info("link_up", gateway=first.welcome.gateway_id, address=address, epoch=epoch)
            self._gateways.record_welcome(address, first.welcome.incarnation, first.welcome.siblings)
            beater = HeartbeatSender(address, self._tls, lambda seq: self._beat(epoch, seq, link), self._timing.beat_s)
            link.silent_s = lambda: beater.silent_s
            self._links[epoch] = link
            self._unlinked.clear()
            if first.welcome.accounts:
                self._usage.attach(epoch, link.outbox)
            self._granter.attach(link.credit_order)
            self._served.attach(epoch, link.incarnation, link.outbox)
            self._regrant()
            self._drain_state.attach(link.outbox, time.monotonic())
            parts = [
                asyncio.create_task(self._read(link, call)),
                asyncio.create_task(self._write(link, call)),
                asyncio.create_task(
                    serve_bulk(pb_grpc.LinkStub(bulk_channel).Bulk(), self._blob_hello(epoch), link.prompts, link.blobs)
                ),
                asyncio.create_task(self._watch_link(link, beater)),
            ]
            try:
                await wait_first(parts)
            finally:
                await self._close_link(link, parts, beater)
                parts.clear()
                call.cancel()

    def _metadata(self) -> Sequence[tuple[str, str]]:
        return (("x-headrace-worker", self._identity.worker_id),)

    def _credit_order(self, epoch: int, gateway: str) -> int:
        """Return the link's place in the order in which gateways share capacity. Each worker has another order.

        A gateway that was last at every worker would get no credit while no call waits and fewer slots are free than
        there are gateways.
        """
        return zlib.crc32(f"{self._identity.worker_id}/{gateway}".encode()) << 32 | epoch

    def _blob_hello(self, epoch: int) -> pb.Blob:
        return pb.Blob(worker_id=self._identity.worker_id, incarnation=self._identity.incarnation, epoch=epoch)

    def _beat(self, epoch: int, seq: int, link: LinkState) -> pb.WorkerBeat:
        return pb.WorkerBeat(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            epoch=epoch,
            seq=seq,
            load=codec.load_to_pb(self._engine.load()),
            acked_seq=link.outbox.acked_seq,
            sent_seq=link.outbox.sent_seq,
        )

    async def _close_link(self, link: LinkState, parts: Sequence[asyncio.Task[None]], beater: HeartbeatSender) -> None:
        """Release everything that a link holds: abort its requests in the engine and revoke its credit."""
        self._links.pop(link.number, None)
        if not self._links:
            self._unlinked.set()
        self._granter.detach(link.credit_order)
        self._served.detach(link.number)
        beater.stop()
        to_abort = self._requests.detach_link(link, stays=self._drain_state.serves and not self._closed.is_set())
        self._usage.detach(link.number, link.outbox)
        for task in (*parts, *link.tasks):
            task.cancel()
        await asyncio.gather(*parts, *link.tasks, return_exceptions=True)
        if to_abort:
            with contextlib.suppress(EngineDead):
                await self._engine.abort(to_abort)
        self._regrant()

    async def _watch_link(self, link: LinkState, beater: HeartbeatSender) -> None:
        """Check the link every beat.

        Raises LinkEnded for a silent or stuck gateway; sends the load if no step has sent it.
        """
        sent = 0
        while True:
            await asyncio.sleep(self._timing.beat_s)
            if beater.silent_s > self._timing.silence_s:
                raise LinkEnded(f"no beat from the gateway for {beater.silent_s:.1f} s")
            if link.outbox.full:
                raise LinkEnded("the gateway does not read; its outbox is full")
            if link.unacked_since is not None and time.monotonic() - link.unacked_since > self._timing.silence_s:
                raise LinkEnded("the gateway sends beats but does not acknowledge its grants")
            link.outbox.work(
                ComputedWork(self._steps, self._busy_s, self._requests.prefilled_tokens, self._requests.decoded_tokens)
            )
            if link.outbox.sent_seq == sent:  # otherwise a step has sent the load
                link.outbox.load(self._engine.load())
                link.outbox.flush()
            sent = link.outbox.sent_seq

    async def _write(self, link: LinkState, call: ClientCall) -> None:
        while True:
            await call.write(await link.outbox.next_message())

    async def _read(self, link: LinkState, call: ClientCall) -> None:
        while (message := await read(call)) is not None:
            try:
                await self._apply(link, message)
            except (ValueError, LookupError) as error:  # the gateway's fault: end only its link
                raise LinkEnded(f"the gateway sent an invalid message: {error}") from error

    async def _apply(self, link: LinkState, message: pb.GatewayTurn) -> None:
        if message.grant_ack:
            self._granter.acknowledge(link.credit_order, message.grant_ack)
            if message.grant_ack >= link.grant_id:
                link.unacked_since = None
            else:
                link.unacked_since = time.monotonic()
        if message.usage_acks:
            self._usage.acked(message.usage_acks)
        for takeover in message.takeovers:  # before the Submits of the gateway that resumed the call
            await self._take_over(takeover.call, takeover.generation)
        for submit in message.submits:
            await self._accept_submit(link, submit)
        if message.HasField("backlog"):  # sequences that still wait after these Submits
            kept = self._requests.count_cached(message.backlog.kept)
            self._granter.set_backlog(link.credit_order, message.backlog.claim or message.backlog.waiting, kept)
            self._served.forward_backlog(link.number, message.backlog)
        if message.aborts:
            await self._abort(link, message.aborts)
        if message.HasField("fetch_bundle"):
            self._spawn(link, self._send_bundle(link, message.fetch_bundle.digest))
        for command in message.commands:
            self._apply_command(command)
        link.outbox.acked_seq = message.seq
        if message.grant_ack or message.HasField("backlog"):
            self._regrant()

    def _is_gateway_lost(self, incarnation: str) -> bool:
        """Return whether no link to a gateway works: no link is up, or the gateway's beats have stopped."""
        links = (link for link in self._links.values() if link.incarnation == incarnation)
        return all(link.silent_s() > GATEWAY_SILENT_S for link in links)

    async def _take_over(self, call: str, generation: int) -> None:
        """Abort the requests of older generations of this call."""
        to_abort = []
        for link, slot, request_id in self._requests.take_over(call, generation):
            if slot in link.submitting:
                link.aborted.add(slot)
            else:
                self._requests.forget(request_id, Outcome.CANCELLED)
                to_abort.append(request_id)
            link.outbox.refused(slot, Outcome.CANCELLED.name, TAKEN_OVER, "")
        await self._abort_requests(to_abort)
        self._regrant()

    # ---- commands

    async def _accept_submit(self, link: LinkState, submit: pb.Submit) -> None:
        """Submit a small request at once, and submit a request with a long prompt or a grammar in a task of its own."""
        if submit.slot in link.requests:
            raise LinkEnded(f"the gateway used slot {submit.slot} for two requests")
        if submit.prompt_blob or len(submit.prompt_ids) > INLINE_PROMPT_BYTES or submit.sampling.HasField("grammar"):
            self._spawn(link, self._submit(link, submit))
        else:
            await self._submit(link, submit)

    async def _submit(self, link: LinkState, submit: pb.Submit) -> None:
        """Run a request or refuse it.

        A failure that the request causes never reaches the link or the link's other requests.
        """
        slot = submit.slot
        request_id = f"{link.incarnation}-{link.number}-{slot}-{submit.attempt}"
        link.requests[slot] = request_id
        link.submitting.add(slot)
        ids = submit.prompt_ids
        if submit.prompt_blob:
            ids = await link.prompts.pop_prompt(submit.prompt_blob)
        self._granter.record_submit(link.credit_order, *credit_used(submit, ids))
        try:
            request = codec.submit_from_pb(submit, request_id, ids)
        except Exception as error:
            self._refuse_failed(link, slot, f"the gateway's Submit cannot be read: {error}")
            return
        try:
            await self._run_request(link, submit, request)
        except EngineRefused as refused:
            self._withdraw(request_id, Outcome.INVALID_FIELD)
            link.requests.pop(slot, None)
            link.outbox.refused(slot, refused.reason, refused.message, refused.field)
        except EngineDead as dead:
            self._fail(dead)
        except BaseException as error:
            if not is_call_failure(error):
                raise
            log.exception("request_failed", request=request_id)
            self._withdraw(request_id, Outcome.INTERNAL)
            self._abort_in_background([request_id])
            self._refuse_failed(link, slot, f"the worker failed on this request: {type(error).__name__}")
        await self._finish_submit(link, slot)

    async def _run_request(self, link: LinkState, submit: pb.Submit, request: EngineRequest) -> None:
        """Reattach a resumed request, or submit it to the engine. Raises EngineRefused and EngineDead."""
        if submit.generation:
            await self._take_over(call_of(submit.stream), submit.generation)
        if self._requests.generations.is_outdated(submit.stream, submit.generation):
            raise EngineRefused(Outcome.CANCELLED.name, TAKEN_OVER)
        running = self._requests.new_request(link, submit, request)
        reattached, to_abort = self._requests.reattach(running, submit)
        self._abort_in_background(to_abort)
        if reattached:
            self._regrant()
            return
        self._abort_in_background(self._requests.start(running, request.request_id, submit))
        await self._engine.submit(request)
        running.accepted = True
        link.outbox.accepted(submit.slot)

    def _withdraw(self, request_id: str, outcome: Outcome) -> None:
        """Forget a request that the engine has not accepted."""
        self._served.revoked(request_id)
        self._requests.forget(request_id, outcome)
        self._regrant()

    async def _finish_submit(self, link: LinkState, slot: int) -> None:
        """Finish a Submit, and apply an abort that arrived while it was in progress."""
        link.submitting.discard(slot)
        if slot in link.aborted:
            link.aborted.discard(slot)
            await self._abort(link, [slot])

    def _abort_in_background(self, request_ids: Sequence[str]) -> None:
        """Abort requests in the engine in a task of the session, which the end of a link does not cancel."""
        if request_ids:
            task = asyncio.create_task(self._abort_requests(request_ids))
            self._abort_tasks.add(task)
            task.add_done_callback(self._abort_tasks.discard)

    @staticmethod
    def _refuse_failed(link: LinkState, slot: int, why: str) -> None:
        """Refuse a Submit that cannot be read or on which the worker failed. Other calls are not affected."""
        link.requests.pop(slot, None)
        link.submitting.discard(slot)
        link.aborted.discard(slot)
        link.outbox.refused(slot, Outcome.INTERNAL.name, why, "")

    async def _abort(self, link: LinkState, slots: Sequence[int]) -> None:
        to_abort = []
        for slot in slots:
            request_id = link.requests.get(slot)
            if slot in link.submitting:
                link.aborted.add(slot)
            elif request_id is not None:  # None: the request ended while the abort was on its way
                self._requests.forget(request_id, Outcome.CANCELLED)
                to_abort.append(request_id)
        await self._abort_requests(to_abort)
        self._regrant()

    async def _abort_requests(self, request_ids: Sequence[str]) -> None:
        if not request_ids:
            return
        try:
            await self._engine.abort(request_ids)
        except EngineDead as dead:
            self._fail(dead)
        except Exception:  # these requests run on; the link and the engine loop must keep serving others
            log.exception("abort_failed", requests=len(request_ids))

    def _apply_command(self, command: pb.Command) -> None:
        """Apply an operator's command, which any gateway may forward."""
        verb = command.WhichOneof("verb")
        log.info("command", verb=verb, worker=self._identity.worker_id)
        if verb == "cordon":
            self._drain_state.cordon(time.monotonic())
        elif verb == "uncordon":
            self._end_drains()
            if self._drain_state.uncordon(time.monotonic()):
                self._regrant()
        elif verb == "drain" and not self._drain_state.leaving:
            self._end_drains()
            task = asyncio.create_task(self.drain(command.drain.timeout_ms / 1000, leaving=False))
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)

    def _end_drains(self) -> None:
        for task in self._drains:
            task.cancel()

    def _fail(self, error: EngineDead) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    def _spawn(self, link: LinkState, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        link.tasks.add(task)
        task.add_done_callback(link.tasks.discard)

    async def _send_bundle(self, link: LinkState, digest: str) -> None:
        await send_bundle(link.blobs, digest, self._bundle if digest == self._identity.bundle_digest else None)
