"""The worker's end of its links: takes Submits from every gateway, runs them on one engine, sends each step's outputs.

The engine loop never awaits a link (outbox.py). A link that ends takes its requests with it: they are aborted in the
engine, and the gateway decides what becomes of the calls; those that may come back through another gateway run on for a
moment (detached_requests.py). Request ids inside the engine are gateway incarnation,
epoch, slot and attempt, since a repeated id is fatal inside vLLM's engine core.
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
from cluster.wire.dial import Beater, LinkEnded, Timing, open_channel, open_client, read, until_first
from cluster.wire.ended_requests import UsageKeeper
from cluster.wire.outbox import Outbox
from cluster.wire.tls import TlsFiles
from cluster.worker.drain_state import DrainStates
from cluster.worker.gpu_meter import GpuMeter
from cluster.worker.resume_generations import call_of
from cluster.worker.running_requests import RunningRequests, spent_by
from cluster.worker.served_reports import ServedReports
from cluster.worker.session_state import LinkState, WorkerStatistics
from cluster.worker.usage import WorkerUsage

log = structlog.get_logger("worker")

INLINE_PROMPT_BYTES = 16_384
_EPOCHS = (1 << 32) - 1
REPORT_S = 0.1
GATEWAY_SILENT_S = 1.0
"""Without beats for so long a gateway is lost to the calls that were resumed from it; they come ten times a second."""
TAKEN_OVER = "the call was resumed elsewhere: its stream goes on there"
TURN = "/cluster.link.v1.Link/Turn"
# How long a drained worker waits until its last counts are acknowledged.
HAND_OVER_S = 5.0
FAREWELL_S = 0.5
"""How long a worker whose engine has ended waits until its gateways have read why and closed their links: a gateway
does so at once, and a busy one after what it has to do first. Its own reset of the link would overtake the reason."""


class WorkerSession:
    """Serves one started engine to every gateway in `gateways` (`host:port`) and their siblings until closed."""

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
        """`outbox_tokens`: token ids that may wait for one gateway before its link is closed. `gpus` of type `gpu` are
        the replica's, for the ledger; every `idle_report_s` their idle time is told."""
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
            identity.incarnation, keeper or UsageKeeper(), meter, gpu, idle_report_s, lambda: self._calls.shares()
        )
        self._served = ServedReports()
        self._calls = RunningRequests(info, meter, self._served, self._usage, self._is_lost)
        self._duty = DrainStates(lambda: (link.outbox for link in self._links.values()))
        self._drains: set[asyncio.Task[bool]] = set()
        self._drops: set[asyncio.Task[None]] = set()
        self._load = EngineLoad()
        self._closed = asyncio.Event()
        self._engine_ended = ""
        self._unlinked = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    def statistics(self) -> WorkerStatistics:
        """A snapshot."""
        kept = self._usage.statistics()
        return WorkerStatistics(
            len(self._links),
            self._calls.running,
            self._calls.tokens,
            self._steps,
            self._granter.promised(),
            kept.kept,
            kept.dropped,
            len(self._calls.orphans),
        )

    async def run(self) -> None:
        """Serve until `close`. Raises EngineDead once the engine is lost; every link is closed by then."""
        self._failed = asyncio.get_running_loop().create_future()
        work: list[asyncio.Future[None]] = [
            self._failed,
            asyncio.create_task(self._engine_loop()),
            asyncio.create_task(self._until_closed()),
            asyncio.create_task(self._gateways.dial(self._session, self._timing)),
            asyncio.create_task(self._usage.look_after()),
            asyncio.create_task(self._report_served()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            failures = [part.exception() for part in done if not part.cancelled()]
            await self._report_end(next((str(one) for one in failures if isinstance(one, EngineDead)), ""))
            for part in done:
                part.result()
        finally:
            for part in work:
                part.cancel()
            self._end_drains()
            await asyncio.gather(*work, *self._drains, *self._drops, return_exceptions=True)
            with contextlib.suppress(EngineDead):
                await self._engine.abort(self._calls.orphans.expired(math.inf))

    async def _until_closed(self) -> None:
        await self._closed.wait()

    async def drain(self, timeout_s: float, leaving: bool = True) -> bool:
        """Take no new work and wait for what runs; False when something still ran at the end. `leaving`: the process
        ends afterwards, so that no uncordon takes it back."""
        self._duty.drain(time.monotonic(), timeout_s, leaving)
        try:
            async with asyncio.timeout(timeout_s):
                await self._calls.idle.wait()
        except TimeoutError:
            return False
        await self._usage.hand_over(min(timeout_s, HAND_OVER_S))
        self._duty.drained(time.monotonic())
        return True

    async def close(self, engine_ended: str = "") -> None:
        """End every link; `run` returns. `engine_ended`: why the engine has ended, which the gateways are told."""
        self._engine_ended = self._engine_ended or engine_ended
        self._closed.set()

    async def _report_end(self, why: str) -> None:
        """Send every gateway why the engine has ended, if it has, and let it close its link."""
        self._engine_ended = self._engine_ended or why
        if not self._engine_ended or not self._links:
            return
        for link in self._links.values():
            link.outbox.engine_ended(self._engine_ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._unlinked.wait()

    # ---- the engine's side

    async def _engine_loop(self) -> None:
        while True:
            outputs = await self._engine.step()
            self._steps += 1
            touched, doomed = self._calls.stepped(outputs)
            if doomed:
                await self._drop(doomed)
            self._load = self._engine.load()
            self._busy_s += self._load.step_s
            self._regrant()
            for link in touched:
                link.outbox.load(self._load)
                link.outbox.flush()

    async def _report_served(self) -> None:
        """Tell every gateway whom this worker serves; nothing of it is done for each token. Requests that nobody has
        come back for end as often."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._served.report(self._calls.output_tokens())
            if late := self._calls.orphans.expired(time.monotonic()):
                log.info("orphans_dropped", requests=len(late))
                await self._drop(late)
                self._regrant()

    def _regrant(self) -> None:
        if not self._duty.serves:
            return
        for grant in self._granter.grants(*self._calls.room()):
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
            call = client.call(TURN, pb.WorkerTurn.SerializeToString, pb.GatewayTurn.FromString, self._metadata())
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
                self._turn(epoch, first.welcome.incarnation),
                first.welcome.gateway_id,
                first.welcome.incarnation,
                Outbox(self._outbox_tokens),
            )
            log.info("link_up", gateway=first.welcome.gateway_id, address=address, epoch=epoch)
            self._gateways.welcomed(address, first.welcome.incarnation, first.welcome.siblings)
            beater = Beater(address, self._tls, lambda seq: self._beat(epoch, seq, link), self._timing.beat_s)
            link.silent_s = lambda: beater.silent_s
            self._links[epoch] = link
            self._unlinked.clear()
            if first.welcome.accounts:
                self._usage.attach(epoch, link.outbox)
            self._granter.attach(link.turn)
            self._served.attach(epoch, link.incarnation, link.outbox)
            self._regrant()
            self._duty.attach(link.outbox, time.monotonic())
            parts = [
                asyncio.create_task(self._read(link, call)),
                asyncio.create_task(self._write(link, call)),
                asyncio.create_task(
                    serve_bulk(pb_grpc.LinkStub(bulk_channel).Bulk(), self._blob_hello(epoch), link.prompts, link.blobs)
                ),
                asyncio.create_task(self._watch(link, beater)),
            ]
            try:
                await until_first(parts)
            finally:
                await self._end(link, parts, beater)
                parts.clear()
                call.cancel()

    def _metadata(self) -> Sequence[tuple[str, str]]:
        return (("x-headrace-worker", self._identity.worker_id),)

    def _turn(self, epoch: int, gateway: str) -> int:
        """Another order of the gateways at each worker: were one the last everywhere, it would have no credit at all
        while nobody waits and less room is free than there are gateways."""
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

    async def _end(self, link: LinkState, parts: Sequence[asyncio.Task[None]], beater: Beater) -> None:
        """Undo all that a session has taken: its requests leave the engine, its promises lapse."""
        self._links.pop(link.number, None)
        if not self._links:
            self._unlinked.set()
        self._granter.detach(link.turn)
        self._served.detach(link.number)
        beater.stop()
        doomed = self._calls.leave(link, stays=self._duty.serves and not self._closed.is_set())
        self._usage.detach(link.number, link.outbox)
        for task in (*parts, *link.tasks):
            task.cancel()
        await asyncio.gather(*parts, *link.tasks, return_exceptions=True)
        if doomed:
            with contextlib.suppress(EngineDead):
                await self._engine.abort(doomed)
        self._regrant()

    async def _watch(self, link: LinkState, beater: Beater) -> None:
        """Look after the link: silence of the gateway, a full outbox, and frames that were in no hurry."""
        sent = 0
        while True:
            await asyncio.sleep(self._timing.beat_s)
            if beater.silent_s > self._timing.silence_s:
                raise LinkEnded(f"no beat from the gateway for {beater.silent_s:.1f} s")
            if link.outbox.full:
                raise LinkEnded("the gateway does not read; its outbox is full")
            if link.unacked_since is not None and time.monotonic() - link.unacked_since > self._timing.silence_s:
                raise LinkEnded("the gateway beats but acknowledges nothing")
            link.outbox.work(
                ComputedWork(self._steps, self._busy_s, self._calls.prefilled_tokens, self._calls.decoded_tokens)
            )
            if link.outbox.sent_seq == sent:  # steps tell the load, beats too
                link.outbox.load(self._engine.load())
                link.outbox.flush()
            sent = link.outbox.sent_seq

    async def _write(self, link: LinkState, call: ClientCall) -> None:
        while True:
            await call.write(await link.outbox.take())

    async def _read(self, link: LinkState, call: ClientCall) -> None:
        while (message := await read(call)) is not None:
            try:
                await self._apply(link, message)
            except (ValueError, LookupError) as error:  # the gateway's fault, and only its link's end
                raise LinkEnded(f"the gateway sent what cannot be applied: {error}") from error

    async def _apply(self, link: LinkState, message: pb.GatewayTurn) -> None:
        if message.grant_ack:
            self._granter.acked(link.turn, message.grant_ack)
            if message.grant_ack >= link.grant_id:
                link.unacked_since = None
            else:
                link.unacked_since = time.monotonic()
        if message.usage_acks:
            self._usage.acked(message.usage_acks)
        for takeover in message.takeovers:  # before the Submits of those who have taken over
            await self._take_over(takeover.call, takeover.generation)
        for submit in message.submits:
            await self._take(link, submit)
        if message.HasField("backlog"):  # of what waits besides
            kept = self._calls.kept(message.backlog.kept)
            self._granter.backlog(link.turn, message.backlog.claim or message.backlog.waiting, kept)
            self._served.relay(link.number, message.backlog)
        if message.aborts:
            await self._abort(link, message.aborts)
        if message.HasField("fetch_bundle"):
            self._spawn(link, self._send_bundle(link, message.fetch_bundle.digest))
        for command in message.commands:
            self._command(command)
        link.outbox.acked_seq = message.seq
        if message.grant_ack or message.HasField("backlog"):
            self._regrant()

    def _is_lost(self, incarnation: str) -> bool:
        """Whether no link to a gateway works: none is up, or its beats have stopped."""
        links = (one for one in self._links.values() if one.incarnation == incarnation)
        return all(one.silent_s() > GATEWAY_SILENT_S for one in links)

    async def _take_over(self, call: str, generation: int) -> None:
        """End what runs here of the call for readers before this one."""
        doomed = []
        for link, slot, request_id in self._calls.take_over(call, generation):
            if slot in link.submitting:
                link.aborted.add(slot)
            else:
                self._calls.forget(request_id, Outcome.CANCELLED)
                doomed.append(request_id)
            link.outbox.refused(slot, Outcome.CANCELLED.name, TAKEN_OVER, "")
        await self._drop(doomed)
        self._regrant()

    # ---- commands

    async def _take(self, link: LinkState, submit: pb.Submit) -> None:
        """Small requests go straight in; long prompts and grammars take their time beside the reader."""
        if submit.slot in link.requests:
            raise LinkEnded(f"the gateway used slot {submit.slot} for two requests")
        if submit.prompt_blob or len(submit.prompt_ids) > INLINE_PROMPT_BYTES or submit.sampling.HasField("grammar"):
            self._spawn(link, self._submit(link, submit))
        else:
            await self._submit(link, submit)

    async def _submit(self, link: LinkState, submit: pb.Submit) -> None:
        """Run a request, or refuse it: nothing that it makes go wrong reaches the link and its other requests."""
        slot = submit.slot
        request_id = f"{link.incarnation}-{link.number}-{slot}-{submit.attempt}"
        link.requests[slot] = request_id
        link.submitting.add(slot)
        ids = submit.prompt_ids
        if submit.prompt_blob:
            ids = await link.prompts.take(submit.prompt_blob)
        self._granter.spent(link.turn, *spent_by(submit, ids))
        try:
            request = codec.submit_from_pb(submit, request_id, ids)
        except Exception as error:
            self._unacceptable(link, slot, f"the gateway's Submit cannot be read: {error}")
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
            self._let_go([request_id])
            self._unacceptable(link, slot, f"the worker failed on this request: {type(error).__name__}")
        await self._overtaken(link, slot)

    async def _run_request(self, link: LinkState, submit: pb.Submit, request: EngineRequest) -> None:
        """Join what still runs for it here, or give it to the engine. Raises EngineRefused and EngineDead."""
        if submit.generation:
            await self._take_over(call_of(submit.stream), submit.generation)
        if self._calls.takeovers.outdated(submit.stream, submit.generation):
            raise EngineRefused(Outcome.CANCELLED.name, TAKEN_OVER)
        running = self._calls.entered(link, submit, request)
        joined, doomed = self._calls.join(running, submit)
        self._let_go(doomed)
        if joined:
            self._regrant()
            return
        self._let_go(self._calls.begin(running, request.request_id, submit))
        await self._engine.submit(request)
        running.accepted = True
        link.outbox.accepted(submit.slot)

    def _withdraw(self, request_id: str, outcome: Outcome) -> None:
        """Forget a request that the engine has not taken."""
        self._served.revoked(request_id)
        self._calls.forget(request_id, outcome)
        self._regrant()

    async def _overtaken(self, link: LinkState, slot: int) -> None:
        """A Submit is through; an abort may have overtaken a slow one."""
        link.submitting.discard(slot)
        if slot in link.aborted:
            link.aborted.discard(slot)
            await self._abort(link, [slot])

    def _let_go(self, request_ids: Sequence[str]) -> None:
        """They leave the engine, whatever becomes of the link whose call made them."""
        if request_ids:
            task = asyncio.create_task(self._drop(request_ids))
            self._drops.add(task)
            task.add_done_callback(self._drops.discard)

    @staticmethod
    def _unacceptable(link: LinkState, slot: int, why: str) -> None:
        """Refuse a Submit that cannot be read, or that the worker failed on; no other call notices."""
        link.requests.pop(slot, None)
        link.submitting.discard(slot)
        link.aborted.discard(slot)
        link.outbox.refused(slot, Outcome.INTERNAL.name, why, "")

    async def _abort(self, link: LinkState, slots: Sequence[int]) -> None:
        doomed = []
        for slot in slots:
            request_id = link.requests.get(slot)
            if slot in link.submitting:
                link.aborted.add(slot)
            elif request_id is not None:  # else it ended by itself while the abort was on its way
                self._calls.forget(request_id, Outcome.CANCELLED)
                doomed.append(request_id)
        await self._drop(doomed)
        self._regrant()

    async def _drop(self, request_ids: Sequence[str]) -> None:
        if not request_ids:
            return
        try:
            await self._engine.abort(request_ids)
        except EngineDead as dead:
            self._fail(dead)
        except Exception:  # these requests run on; the link and the engine loop serve others
            log.exception("abort_failed", requests=len(request_ids))

    def _command(self, command: pb.Command) -> None:
        """What an operator asks, through whichever gateway."""
        verb = command.WhichOneof("verb")
        log.info("command", verb=verb, worker=self._identity.worker_id)
        if verb == "cordon":
            self._duty.cordon(time.monotonic())
        elif verb == "uncordon":
            self._end_drains()
            if self._duty.uncordon(time.monotonic()):
                self._regrant()
        elif verb == "drain" and not self._duty.leaving:
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
