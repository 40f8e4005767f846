"""The worker's end of its links: takes Submits from every gateway, runs them on one engine, sends each step's outputs.

The engine loop never awaits a link (outbox.py). A link that ends takes its requests with it: they are aborted in the
engine, and the gateway decides what becomes of the calls; those that may come back through another gateway run on for a
moment (orphans.py). Request ids inside the engine are gateway incarnation,
epoch, slot and attempt, since a repeated id is fatal inside vLLM's engine core.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
import zlib
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace

import structlog

from cluster.api.bundle import Bundle
from cluster.api.demand import Work
from cluster.api.outcomes import Outcome
from cluster.api.ports import Engine, EngineDead, EngineRefused
from cluster.api.types import EngineInfo, EngineLoad, FinishReason, TokenOutput, WorkerIdentity
from cluster.link import codec
from cluster.link.bulk import send_bundle, serve_bulk
from cluster.link.credit import Granter, Room
from cluster.link.dial import Beater, LinkEnded, Timing, open_channel, open_client, read, until_first
from cluster.link.gpu_meter import GpuMeter, Share
from cluster.link.lookahead import Lookahead
from cluster.link.orphans import BROKEN, Orphan, Orphans
from cluster.link.outbox import Outbox
from cluster.link.served_reports import ServedReports
from cluster.link.siblings import Gateways
from cluster.link.standing import Duty
from cluster.link.tls import TlsFiles
from cluster.link.usage_keeper import EndedUsage, UsageKeeper
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.link.worker_state import Link, Running, Step, WorkerStatistics
from cluster.link.worker_usage import WorkerUsage
from cluster.rpc.client import ClientCall

log = structlog.get_logger("worker")

INLINE_PROMPT_BYTES = 16_384
_EPOCHS = (1 << 32) - 1
REPORT_S = 0.1
TURN = "/cluster.link.v1.Link/Turn"
# How long a drained worker waits until its last counts are acknowledged.
HAND_OVER_S = 5.0

_OUTCOMES = {FinishReason.ERROR: Outcome.INTERNAL, FinishReason.ABORT: Outcome.CANCELLED}


class WorkerEnd:
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
        self._gateways = Gateways(gateways)
        self._tls = tls
        self._timing = timing or Timing()
        self._outbox_tokens = outbox_tokens
        self._granter = Granter()
        self._lookahead = Lookahead(info.max_num_seqs, info.max_num_batched_tokens)
        self._keeps = True
        """Whether calls that come back have found their KV blocks here lately: not every engine caches."""
        self._links: dict[int, Link] = {}
        self._running: dict[str, Running] = {}
        self._orphans = Orphans()
        self._joined: dict[str, Running] = {}
        """Those that were orphans and have had no output since."""
        self._told = Step()
        """What was told between two steps."""
        self._tokens = 0
        self._busy_s = 0.0
        self._prefilled_tokens = self._decoded_tokens = 0
        self._epochs = itertools.count(1)
        self._steps = 0
        self._meter = GpuMeter(gpus, info.max_num_batched_tokens, time.monotonic())
        self._usage = WorkerUsage(
            identity.incarnation, keeper or UsageKeeper(), self._meter, gpu, idle_report_s, self._shares
        )
        self._served = ServedReports()
        self._duty = Duty(lambda: (link.outbox for link in self._links.values()))
        self._drains: set[asyncio.Task[bool]] = set()
        self._drops: set[asyncio.Task[None]] = set()
        self._load = EngineLoad()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    def statistics(self) -> WorkerStatistics:
        """A snapshot."""
        kept = self._usage.statistics()
        return WorkerStatistics(
            len(self._links),
            len(self._running),
            self._tokens,
            self._steps,
            self._granter.promised(),
            kept.kept,
            kept.dropped,
            len(self._orphans),
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
            for part in done:
                part.result()
        finally:
            for part in work:
                part.cancel()
            self._end_drains()
            await asyncio.gather(*work, *self._drains, *self._drops, return_exceptions=True)
            with contextlib.suppress(EngineDead):
                await self._engine.abort(self._orphans.expired(math.inf))

    async def _until_closed(self) -> None:
        await self._closed.wait()

    async def drain(self, timeout_s: float, leaving: bool = True) -> bool:
        """Take no new work and wait for what runs; False when something still ran at the end. `leaving`: the process
        ends afterwards, so that no uncordon takes it back."""
        self._duty.drain(time.monotonic(), timeout_s, leaving)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        await self._usage.hand_over(min(timeout_s, HAND_OVER_S))
        self._duty.drained(time.monotonic())
        return True

    async def close(self) -> None:
        """End every link; `run` returns."""
        self._closed.set()

    # ---- the engine's side

    async def _engine_loop(self) -> None:
        while True:
            outputs = await self._engine.step()
            self._steps += 1
            step, self._told = self._told, Step()
            told = step.tokens
            self._hand_out(outputs, step)
            self._decoded_tokens += step.tokens - told + step.of_orphans
            if self._meter.gpus:
                self._meter.step(time.monotonic(), step.tokens + step.of_orphans, step.firsts)
            if doomed := self._end_finished(step):
                await self._drop(doomed)
            if not self._running:  # what nobody waits for is nobody's time
                self._meter.rested()
            self._lookahead.stepped()
            self._load = self._engine.load()
            self._busy_s += self._load.step_s
            self._regrant()
            for link in step.touched.values():
                link.outbox.load(self._load)
                link.outbox.flush()

    def _hand_out(self, outputs: Sequence[TokenOutput], step: Step) -> None:
        """Give each link its tokens, and note what was given."""
        emitted = 0
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                step.of_orphans += self._orphans.output(output)
                continue  # aborted, if it is none of these; one more step may still hold it
            if output.request_id in self._joined:
                output = replace(output, prompt_tokens=running.prompt_tokens, cached_tokens=running.cached_tokens)
            link = running.link
            link.outbox.output(running.slot, output)
            step.touched[link.number] = link
            count = len(output.token_ids)
            running.tokens += count
            emitted += count
            if running.token_ids is not None:
                running.token_ids += output.token_ids
            if output.prompt_tokens is not None:
                step.firsts.append((running.share, self._began(running, output), count))
            if output.finish is not None:
                running.accepted = True
                step.finished.append((running, output))
        self._tokens += emitted
        step.tokens += emitted

    def _began(self, running: Running, output: TokenOutput) -> int:
        """Its first output here has come, and is counted; so many tokens were computed for it."""
        running.accepted = True
        running.cached_tokens = output.cached_tokens or 0
        self._lookahead.began(output.request_id)
        if not running.emitted_tokens:  # of a continued one its first worker has told
            self._served.cached(output.request_id, running.cached_tokens)
        if self._joined.pop(output.request_id, None) is not None:
            running.cached_tokens = min(running.cached_tokens, running.prompt_tokens)
            return 0
        if running.came_home:
            self._keeps = 2 * running.cached_tokens >= running.prompt_tokens
        computed = running.prompt_tokens + running.emitted_tokens - running.cached_tokens
        self._prefilled_tokens += computed
        return computed

    def _end_finished(self, step: Step) -> list[str]:
        """Forget those that have ended, once the step is accounted for; their ends can be asked for if a gateway is
        lost with what has just been sent. Returns what is to leave the engine for it."""
        doomed: list[str] = []
        for running, output in step.finished:
            reason = output.finish or FinishReason.STOP
            self._forget(output.request_id, _OUTCOMES.get(reason, Outcome.OK))
            if running.token_ids and reason not in BROKEN:
                doomed += self._orphans.leave(running.orphan(output.request_id, output), time.monotonic())
        return doomed

    def _forget(self, request_id: str, outcome: Outcome) -> None:
        """A request has ended; its counts are kept if it was accepted with a record."""
        running = self._running.pop(request_id, None)
        if running is None:
            return
        self._tokens -= running.tokens
        self._joined.pop(request_id, None)
        self._lookahead.ended(request_id)
        self._served.ended(request_id, running.output_tokens)
        running.link.requests.pop(running.slot, None)
        if running.accepted:
            gpu_seconds = self._meter.charge(running.share, running.generated)
            if running.sealed:
                self._keep(running, outcome, gpu_seconds)
        if not self._running:
            self._meter.rested()
            self._idle.set()

    def _shares(self) -> Iterator[tuple[Share, int]]:
        return ((running.share, running.generated) for running in self._running.values())

    async def _report_served(self) -> None:
        """Tell every gateway whom this worker serves; nothing of it is done for each token. Requests that nobody has
        come back for end as often."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._served.report((request_id, one.output_tokens) for request_id, one in self._running.items())
            if late := self._orphans.expired(time.monotonic()):
                log.info("orphans_dropped", requests=len(late))
                await self._drop(late)
                self._regrant()

    def _keep(self, running: Running, outcome: Outcome, gpu_seconds: float) -> None:
        usage = EndedUsage(
            running.sealed,
            prompt_tokens=running.prompt_tokens,
            cached_tokens=running.cached_tokens,
            generated_tokens=running.generated,
            written_tokens=running.generated,
            earlier_tokens=running.earlier_tokens,
            gpu_seconds=gpu_seconds,
            gpu=self._usage.gpu,
            outcome=outcome.value,
            duration_s=time.monotonic() - running.began,
        )
        self._usage.keep(usage, running.link.number, running.slot)

    def _regrant(self) -> None:
        if not self._duty.serves:
            return
        begins = min(self._lookahead.sequences, self._lookahead.places - len(self._orphans))
        room = Room(begins, self._info.kv_tokens - self._tokens)
        for grant in self._granter.grants(room, self._lookahead.places):
            link = self._links[grant.link & _EPOCHS]
            link.outbox.grant(grant)
            link.grant_id = grant.grant_id
            if link.unacked_since is None:
                link.unacked_since = time.monotonic()

    # ---- one session with one gateway

    async def _session(self, address: str) -> None:
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
            link = Link(
                epoch,
                self._turn(epoch, first.welcome.incarnation),
                first.welcome.gateway_id,
                first.welcome.incarnation,
                Outbox(self._outbox_tokens),
            )
            log.info("link_up", gateway=first.welcome.gateway_id, address=address, epoch=epoch)
            self._gateways.welcomed(address, first.welcome.incarnation, first.welcome.siblings)
            beater = Beater(address, self._tls, lambda seq: self._beat(epoch, seq, link), self._timing.beat_s)
            self._links[epoch] = link
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

    def _beat(self, epoch: int, seq: int, link: Link) -> pb.WorkerBeat:
        return pb.WorkerBeat(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            epoch=epoch,
            seq=seq,
            load=codec.load_to_pb(self._engine.load()),
            acked_seq=link.outbox.acked_seq,
            sent_seq=link.outbox.sent_seq,
        )

    async def _end(self, link: Link, parts: Sequence[asyncio.Task[None]], beater: Beater) -> None:
        """Undo all that a session has taken: its requests leave the engine, its promises lapse."""
        self._links.pop(link.number, None)
        self._granter.detach(link.turn)
        self._served.detach(link.number)
        beater.stop()
        doomed = self._leave(link)
        self._usage.detach(link.number, link.outbox)
        for task in (*parts, *link.tasks):
            task.cancel()
        await asyncio.gather(*parts, *link.tasks, return_exceptions=True)
        if doomed:
            with contextlib.suppress(EngineDead):
                await self._engine.abort(doomed)
        self._regrant()

    def _leave(self, link: Link) -> list[str]:
        """Nobody waits for its requests any longer; those that are to leave the engine."""
        now, stays = time.monotonic(), self._duty.serves and not self._closed.is_set()
        elsewhere = {one.stream for one in self._running.values() if one.link is not link}  # has come back already
        doomed, left = [], 0
        for slot, request_id in list(link.requests.items()):
            running = self._running.get(request_id)
            self._forget(request_id, Outcome.CANCELLED)
            lasts = stays and slot not in link.submitting
            if not lasts or running is None or not running.token_ids or running.stream in elsewhere:
                doomed.append(request_id)
            else:
                doomed += self._orphans.leave(running.orphan(request_id), now)
                left += 1
        if left:
            log.info("orphans", requests=left, gateway=link.gateway)
        return doomed

    async def _watch(self, link: Link, beater: Beater) -> None:
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
            link.outbox.work(Work(self._steps, self._busy_s, self._prefilled_tokens, self._decoded_tokens))
            if link.outbox.sent_seq == sent:  # steps tell the load, beats too
                link.outbox.load(self._engine.load())
                link.outbox.flush()
            sent = link.outbox.sent_seq

    async def _write(self, link: Link, call: ClientCall) -> None:
        while True:
            await call.write(await link.outbox.take())

    async def _read(self, link: Link, call: ClientCall) -> None:
        while (message := await read(call)) is not None:
            try:
                await self._apply(link, message)
            except (ValueError, LookupError) as error:  # the gateway's fault, and only its link's end
                raise LinkEnded(f"the gateway sent what cannot be applied: {error}") from error

    async def _apply(self, link: Link, message: pb.GatewayTurn) -> None:
        if message.grant_ack:
            self._granter.acked(link.turn, message.grant_ack)
            if message.grant_ack >= link.grant_id:
                link.unacked_since = None
            else:
                link.unacked_since = time.monotonic()
        if message.usage_acks:
            self._usage.acked(message.usage_acks)
        for submit in message.submits:
            await self._take(link, submit)
        if message.HasField("backlog"):  # of what waits besides
            kept = message.backlog.kept if self._keeps else min(message.backlog.kept, len(self._orphans))
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

    # ---- commands

    async def _take(self, link: Link, submit: pb.Submit) -> None:
        """Small requests go straight in; long prompts and grammars take their time beside the reader."""
        if submit.slot in link.requests:
            raise LinkEnded(f"the gateway used slot {submit.slot} for two requests")
        if submit.prompt_blob or len(submit.prompt_ids) > INLINE_PROMPT_BYTES or submit.sampling.HasField("grammar"):
            self._spawn(link, self._submit(link, submit))
        else:
            await self._submit(link, submit)

    async def _submit(self, link: Link, submit: pb.Submit) -> None:
        slot = submit.slot
        request_id = f"{link.incarnation}-{link.number}-{slot}-{submit.attempt}"
        link.requests[slot] = request_id
        link.submitting.add(slot)
        ids = submit.prompt_ids
        if submit.prompt_blob:
            ids = await link.prompts.take(submit.prompt_blob)
        try:
            request = codec.submit_from_pb(submit, request_id, ids)
        except ValueError as error:
            self._granter.spent(link.turn, 0)
            self._unacceptable(link, slot, str(error))
            return
        prompt, emitted = len(request.prompt_token_ids), len(request.emitted_token_ids)
        tokens = prompt + emitted
        fresh = min(submit.fresh_tokens or tokens, tokens)
        self._granter.spent(link.turn, tokens, fresh < tokens)
        now = time.monotonic()
        share = self._meter.entered(now)
        earlier = submit.earlier_tokens
        home = bool(emitted) and fresh <= self._info.block_size < prompt
        running = Running(link, slot, tokens, prompt, emitted, submit.sealed_record, earlier, share, now, home)
        if submit.stream and request.sampling.logprobs is None:
            running.stream, running.token_ids = submit.stream, list(request.emitted_token_ids)
            running.asked = (request.sampling, request.adapter, request.cache_salt, request.priority)
            orphan = self._orphans.claim(submit.stream, running.asked, prompt, running.token_ids)
            if orphan is not None:
                self._join(running, orphan, submit)
                await self._overtaken(link, slot)
                return
            self._let_go(self._orphans.drop(submit.stream))
        self._running[request_id] = running
        self._lookahead.submitted(request_id, fresh if self._keeps else tokens, begins=not emitted)
        self._tokens += tokens
        self._served.accepted(request_id, link.number, submit, prompt)
        self._idle.clear()
        if self._orphans:
            self._make_room(goes_on=bool(emitted))
        try:
            await self._engine.submit(request)
        except EngineRefused as refused:
            self._served.revoked(request_id)
            self._forget(request_id, Outcome.INVALID_FIELD)
            link.outbox.refused(slot, refused.reason, refused.message, refused.field)
            self._regrant()
        except EngineDead as dead:
            self._fail(dead)
        else:
            running.accepted = True
            link.outbox.accepted(slot)
        await self._overtaken(link, slot)

    async def _overtaken(self, link: Link, slot: int) -> None:
        """A Submit is through; an abort may have overtaken a slow one."""
        link.submitting.discard(slot)
        if slot in link.aborted:
            link.aborted.discard(slot)
            await self._abort(link, [slot])

    def _join(self, running: Running, orphan: Orphan, submit: pb.Submit) -> None:
        """It has come back to what still runs for it: nothing is computed, and what was generated meanwhile is told."""
        link, request_id = running.link, orphan.request_id
        link.requests[running.slot] = request_id
        running.accepted = True
        running.cached_tokens = running.tokens if running.emitted_tokens else orphan.cached_tokens
        self._running[request_id] = self._joined[request_id] = running
        self._lookahead.submitted(request_id, 0, begins=False)
        self._tokens += running.tokens
        self._served.accepted(request_id, link.number, submit, running.prompt_tokens)
        self._idle.clear()
        link.outbox.accepted(running.slot)
        ended = orphan.last
        missed = orphan.token_ids[running.emitted_tokens :]
        if missed or ended is not None:
            output = TokenOutput(request_id, missed) if ended is None else replace(ended, token_ids=missed)
            self._hand_out((output,), self._told)
            self._end_finished(self._told)
            self._told.finished.clear()
            self._regrant()
        link.outbox.flush()

    def _make_room(self, goes_on: bool) -> None:
        """A call has come that has to be computed: where the KV cache lacks room for it, or one that goes on a place,
        those leave for which nobody has come."""
        sequences = len(self._running) + len(self._orphans) - self._info.max_num_seqs if goes_on else 0
        tokens = self._tokens + self._orphans.tokens - self._info.kv_tokens
        self._let_go(self._orphans.make_room(sequences, tokens))

    def _let_go(self, request_ids: Sequence[str]) -> None:
        """They leave the engine, whatever becomes of the link whose call made them."""
        if request_ids:
            task = asyncio.create_task(self._drop(request_ids))
            self._drops.add(task)
            task.add_done_callback(self._drops.discard)

    @staticmethod
    def _unacceptable(link: Link, slot: int, why: str) -> None:
        """A Submit that is none: its sender's fault, and no other call's."""
        link.requests.pop(slot, None)
        link.submitting.discard(slot)
        link.aborted.discard(slot)
        link.outbox.refused(slot, Outcome.INTERNAL.name, f"the gateway's Submit cannot be read: {why}", "")

    async def _abort(self, link: Link, slots: Sequence[int]) -> None:
        doomed = []
        for slot in slots:
            request_id = link.requests.get(slot)
            if slot in link.submitting:
                link.aborted.add(slot)
            elif request_id is not None:  # else it ended by itself while the abort was on its way
                self._forget(request_id, Outcome.CANCELLED)
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

    def _spawn(self, link: Link, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        link.tasks.add(task)
        task.add_done_callback(link.tasks.discard)

    async def _send_bundle(self, link: Link, digest: str) -> None:
        await send_bundle(link.blobs, digest, self._bundle if digest == self._identity.bundle_digest else None)
