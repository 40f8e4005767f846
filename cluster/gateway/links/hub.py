"""The gateway's server for links. The server accepts workers and the controller, and passes each worker's messages to
its WorkerLink."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import structlog

from cluster import http2
from cluster.api.demand import ModelDemand
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, EngineInfo, VersionTally, WorkerIdentity
from cluster.gateway.links.liveness import LinkLiveness, Waking
from cluster.gateway.links.peer_identity import CONTROLLER, PeerIdentity, model_uri
from cluster.gateway.links.worker_link import LinkListener, WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.process import ticks
from cluster.wire import codec
from cluster.wire.admin_forwarding import ANSWER_S, NO_CONTROLLER_LINK, AdminRequests
from cluster.wire.bundle import MAX_BUNDLE_BYTES, Bundle
from cluster.wire.demand_codec import demand_to_pb, work_to_pb
from cluster.wire.dial import MAX_MESSAGE_BYTES, Timing, read
from cluster.wire.lost_engines import LostEngine, LostEngines

log = structlog.get_logger("hub")

TICKS = 10
"""Minimum number of liveness checks within the time after which an inactive worker is suspected."""
LEAST_REST_S = 0.002
CALM = 0.6
"""Fraction of the time until suspicion. Checks become less frequent when more than this fraction remains for every
worker."""
REPORT_S = 0.5
"""Interval in seconds of the demand and fleet reports to the controller."""
NOTICING_S = 0.02
"""Seconds that the detection itself may take. They are part of the time within which an inactive worker must be
detected."""


class HubListener(LinkListener, Protocol):
    """The receiver of a hub's events. The methods are called on the event loop and must not block."""

    @property
    def keeps_accounts(self) -> bool:
        """Whether the usage of ended requests is recorded."""

    def link_up(self, link: WorkerLink) -> None:
        """Handle a worker's link coming up."""

    def link_down(self, link: WorkerLink, why: str) -> None:
        """Handle the end of a worker's link. `lost` has already been called on the link's sinks."""

    def link_changed(self, link: WorkerLink) -> None:
        """Handle a change of a worker's credit or drain state."""

    def apply_catalog(self, entries: Sequence[CatalogEntry]) -> None:
        """Handle a new catalog from the controller."""

    def demand(self) -> Sequence[ModelDemand]:
        """Return the demand to report to the controller."""

    def version_tallies(self) -> Sequence[VersionTally]:
        """Return the canary statistics to report to the controller."""

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return the reason why a worker may not serve its model; "" if the worker may serve."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Counts of a hub: the number of worker links, of requests that run on these links, and of controllers."""

    workers: int
    running: int
    controllers: int


class _Controller:
    def __init__(self, hello: pb.ControllerHello) -> None:
        self.controller_id = hello.controller_id
        self.frames: asyncio.Queue[pb.GatewayControlFrame] = asyncio.Queue()
        """Frames to send to the controller in addition to the periodic reports."""
        self.questions = AdminRequests(self.frames.put_nowait, frozenset(hello.verbs))


class Hub(pb_grpc.LinkServicer):
    """Server of cluster.link.v1.Link, in the read/write style of grpc.aio. The stubs are typed for the generator
    style."""

    def __init__(
        self,
        gateway_id: str,
        listener: HubListener,
        timing: Timing | None = None,
        siblings: Sequence[str] = (),
        by_certificate: bool = False,
    ) -> None:
        """`siblings`: link addresses of the other gateway processes that share the client ports; see link.siblings.
        `by_certificate`: whether the port has TLS, so that a peer's certificate must name the peer's role."""
        self.gateway_id = gateway_id
        self._siblings = tuple(siblings)
        self.incarnation = uuid.uuid4().hex[:12]
        self._since = time.monotonic()
        self._listener = listener
        self._peer_identity = PeerIdentity(by_certificate)
        self._timing = timing or Timing()
        self._links: dict[str, WorkerLink] = {}
        self._controller: _Controller | None = None
        self._bundles: dict[str, asyncio.Future[Bundle]] = {}
        self._bundle_holders: dict[str, WorkerLink | None] = {}
        """The link from which each bundle was requested, by the digest of the bundle; None for the controller. Only
        bundles that are being fetched have an entry."""
        self._waking = Waking(time.monotonic(), self._timing.hang_s / TICKS)
        self._lost = LostEngines()
        self.catalog_at: float | None = None
        self.gateways = 0
        """Number of gateways to which the controller has links, this gateway included; 0 until the controller reports
        the number."""

    def statistics(self) -> HubStatistics:
        """Return the current counts."""
        return HubStatistics(
            len(self._links), sum(link.running for link in self._links.values()), int(self._controller is not None)
        )

    def lost_engines(self) -> Sequence[LostEngine]:
        """Return the engines that have ended in the last minutes, with the reasons that the workers reported."""
        return self._lost.recent(time.time())

    @property
    def links(self) -> Sequence[WorkerLink]:
        """All worker links that are up, sorted by worker id."""
        return [self._links[key] for key in sorted(self._links)]

    # ---- workers

    async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve one epoch of one worker, from the worker's Hello to the end of the link."""
        first = await self._first_message(context)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must hold hello")
        hello = first.hello
        protocol = min(hello.protocol_max, codec.PROTOCOL_MAX)
        if protocol < max(hello.protocol_min, codec.PROTOCOL_MIN):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"link protocol: the worker supports {hello.protocol_min}-{hello.protocol_max}, the gateway "
                f"{codec.PROTOCOL_MIN}-{codec.PROTOCOL_MAX}: upgrade the older side",
            )
        try:
            identity, info = codec.hello_from_pb(hello)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"hello: {error}")
        await self._admit(context, identity, info, hello.epoch)
        link = WorkerLink(identity, info, hello.epoch, self._listener)
        link.liveness = LinkLiveness(self._now(), self._timing.hang_s - NOTICING_S, self._timing.silence_s)
        self._attach(link)  # before the Welcome: once the worker has read the Welcome, it may open Bulk
        parts = [
            asyncio.create_task(self._write(link, context, protocol)),
            asyncio.create_task(self._read(link, context)),
            asyncio.create_task(link.closed.wait()),
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            link.why = link.why or "the connection broke"
            raise
        finally:
            for part in parts:
                part.cancel()
            self._detach(link)
            await asyncio.gather(*parts, return_exceptions=True)
        if link.closed.is_set():  # a cancelled handler would leave the worker without a status
            await context.abort(grpc.StatusCode.UNAVAILABLE, link.why)

    async def _first_message(self, context: Any) -> Any:
        """Return the first message of a stream; None if no message arrives within `welcome_s`."""
        try:
            async with asyncio.timeout(self._timing.welcome_s):
                return await read(context)
        except TimeoutError:
            return None

    async def _admit(self, context: Any, identity: WorkerIdentity, info: EngineInfo, epoch: int) -> None:
        """Abort the stream of a peer that may not act as this worker. A peer with a wrong certificate learns only that
        the certificate is wrong."""
        certificate = context.peer_certificate()
        older = self._links.get(identity.worker_id)
        for model in {identity.model, older.identity.model if older is not None else identity.model}:
            if not self._peer_identity.may_serve(certificate, model):
                await self._refuse_peer(context, model_uri(identity.model))
        if self._peer_identity.is_replayed(identity, epoch):
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"hello: this incarnation has already used epoch {epoch} or a later one",
            )
        if why := self._listener.refusal_of(identity):
            log.warning("worker_refused", worker=identity.worker_id, model=identity.model, reason=why)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"hello: {why}")

    @staticmethod
    async def _refuse_peer(context: Any, name: str) -> None:
        log.warning("stranger_refused", peer=context.peer(), lacks=name)
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED,
            f"the client certificate does not name {name} (see `headrace certs worker --help`)",
        )

    async def _read(self, link: WorkerLink, context: Any) -> None:
        while (message := await read(context)) is not None:
            try:
                changed = link.apply(message)
            except ValueError as error:  # the worker's fault, so only its link ends
                link.close(f"the worker sent what cannot be applied: {error}", "mad")
                return
            if link.liveness is not None:
                now = self._now()
                link.liveness.record_received(message.seq, message.acked_seq, now)
                if message.HasField("load"):
                    link.liveness.record_load(link.load, now)
            if changed:
                self._listener.link_changed(link)

    def _welcome(self, protocol: int) -> pb.Welcome:
        return pb.Welcome(
            protocol=protocol,
            gateway_id=self.gateway_id,
            incarnation=self.incarnation,
            siblings=self._siblings,
            accounts=self._listener.keeps_accounts,
        )

    def _attach(self, link: WorkerLink) -> None:
        older = self._links.get(link.identity.worker_id)
        if older is not None:
            older.close("the worker has reconnected")
            self._detach(older)
        self._links[link.identity.worker_id] = link
        log.info("worker_up", worker=link.identity.worker_id, model=link.identity.model, epoch=link.epoch)
        self._listener.link_up(link)
        self._request_bundles_again()

    def _detach(self, link: WorkerLink) -> None:
        if self._links.get(link.identity.worker_id) is not link:
            return
        del self._links[link.identity.worker_id]
        why = link.why or "the worker closed the link"
        engine = {"engine": link.engine_ended} if link.engine_ended else {}
        log.info("worker_down", worker=link.identity.worker_id, model=link.identity.model, reason=why, **engine)
        if link.engine_ended:
            self._lost.add(link.identity, link.engine_ended, time.time())
        link.end(why)
        self._listener.link_down(link, why)
        self._request_bundles_again()

    async def _write(self, link: WorkerLink, context: Any, protocol: int) -> None:
        await context.write(pb.GatewayTurn(welcome=self._welcome(protocol)))
        while True:
            message = await link.box.next_message()
            if link.liveness is not None:
                link.liveness.record_sent(message.seq, self._now())
            await context.write(message)

    async def Beat(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the heartbeats of one worker. Each heartbeat is answered with a GatewayBeat."""
        certificate = context.peer_certificate()
        while (beat := await read(context)) is not None:
            link = self._links.get(beat.worker_id)
            if link is not None and not self._peer_identity.may_serve(certificate, link.identity.model):
                await self._refuse_peer(context, model_uri(link.identity.model))
            if link is not None and link.identity.incarnation == beat.incarnation and link.epoch == beat.epoch:
                link.last_heard = time.monotonic()
                link.load = codec.load_from_pb(beat.load)
                if link.liveness is not None:
                    link.liveness.record_beat(link.load, beat.acked_seq, beat.sent_seq, self._now())
            await context.write(pb.GatewayBeat(seq=beat.seq))

    def _now(self) -> float:
        """Return the waking time, which excludes pauses of this process."""
        return self._waking.at(time.monotonic())

    async def watch(self) -> None:
        """Check all links, and close the links of workers that are considered lost. Runs until cancelled."""
        while True:
            now = self._now()
            due = math.inf
            for link in list(self._links.values()):
                if link.liveness is None:
                    continue
                suspicion = link.liveness.suspicion(now)
                if suspicion is not None:
                    link.close(suspicion.why, suspicion.reason)
                    self._detach(link)
                else:
                    due = min(due, link.liveness.due)
            rest_s = max(self._rest_s(due - now), LEAST_REST_S)
            self._waking.rest(time.monotonic(), rest_s)
            await asyncio.sleep(rest_s)

    def _rest_s(self, left_s: float) -> float:
        """Return the seconds until the next check. `left_s`: seconds until the first worker would be suspected. While
        all workers are active, checks are aligned with the other periodic work of the process. Once a worker is
        overdue, checks are more frequent."""
        if left_s > max(CALM * self._timing.hang_s, 2 * ticks.TICK_S):
            return ticks.seconds_to_tick(asyncio.get_running_loop().time(), ticks.TICK_S)
        return min(self._timing.hang_s / TICKS, left_s)

    # ---- bulk

    async def Bulk(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the stream of large data, such as prompts and bundles, to and from one worker or controller."""
        hello = await self._first_message(context)
        if hello is None or not hello.worker_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first blob must hold worker_id")
        blobs: asyncio.Queue[pb.Blob] = asyncio.Queue()
        link = self._links.get(hello.worker_id)
        certificate = context.peer_certificate()
        if link is not None and (link.identity.incarnation, link.epoch) == (hello.incarnation, hello.epoch):
            if not self._peer_identity.may_serve(certificate, link.identity.model):
                await self._refuse_peer(context, "its worker's model")
            link.blobs = blobs
        elif not self._peer_identity.may_control(certificate):
            await self._refuse_peer(context, "a worker that is linked, or the controller")
        writer = asyncio.create_task(self._write_blobs(blobs, context))
        parts: dict[str, bytearray] = {}
        try:
            while (blob := await read(context)) is not None:
                self._receive(parts, blob)
        finally:
            writer.cancel()

    async def _write_blobs(self, blobs: asyncio.Queue[pb.Blob], context: Any) -> None:
        while True:
            await context.write(await blobs.get())

    def _receive(self, parts: dict[str, bytearray], blob: pb.Blob) -> None:
        digest = blob.key.removeprefix("bundle:")
        waiting = self._bundles.get(digest)
        if waiting is None or waiting.done():
            parts.pop(blob.key, None)
            return
        if blob.error:
            waiting.set_exception(LookupError(blob.error))
            return
        buffer = parts.setdefault(blob.key, bytearray())
        buffer.extend(blob.data)
        if len(buffer) > MAX_BUNDLE_BYTES:
            waiting.set_exception(LookupError(f"the bundle exceeds {MAX_BUNDLE_BYTES} bytes"))
        elif blob.last:
            try:
                bundle = Bundle.unpack(bytes(parts.pop(blob.key)))
            except ValueError as error:
                waiting.set_exception(LookupError(str(error)))
                return
            if bundle.digest != digest:
                waiting.set_exception(LookupError(f"the received bundle has digest {bundle.digest}, not {digest}"))
            else:
                waiting.set_result(bundle)

    async def fetch_bundle(self, digest: str, timeout_s: float = 30.0) -> Bundle:
        """Fetch a bundle from a worker that has the bundle, else from the controller. Raises LookupError."""
        waiting = self._bundles.get(digest)
        if waiting is None or waiting.done():
            waiting = self._bundles[digest] = asyncio.get_running_loop().create_future()
            if not self._request_bundle(digest):
                del self._bundles[digest]
                raise LookupError("neither the controller nor a worker that has it is connected")
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(waiting)
        except TimeoutError:
            raise LookupError(f"no answer within {timeout_s:g} s") from None
        finally:
            if self._bundles.get(digest) is waiting:
                del self._bundles[digest]
                self._bundle_holders.pop(digest, None)

    def _request_bundle(self, digest: str) -> bool:
        """Request a bundle from a worker that has the bundle, else from the controller. Returns False if neither is
        connected."""
        holder = next((link for link in self.links if link.identity.bundle_digest == digest), None)
        if holder is not None:
            holder.box.fetch(digest)
        elif self._controller is not None:
            frame = pb.GatewayControlFrame(fetch_bundle=pb.FetchBundle(digest=digest))
            self._controller.frames.put_nowait(frame)
        else:
            return False
        self._bundle_holders[digest] = holder
        return True

    def _request_bundles_again(self) -> None:
        """Request bundles again if the link of the worker from which they were requested has ended. Must be called when
        a link has begun or ended."""
        for digest, holder in list(self._bundle_holders.items()):
            if holder is not None and self._links.get(holder.identity.worker_id) is not holder:
                self._request_bundle(digest)

    # ---- controller

    async def ask_controller(self, verb: str, body: bytes, actor: str, timeout_s: float = ANSWER_S) -> bytes:
        """Forward an admin verb to the controller and return its answer. Raises CallError."""
        if self._controller is None:
            raise CallError(Outcome.NO_WORKER, NO_CONTROLLER_LINK, retry_after_s=2.0)
        return await self._controller.questions.ask(verb, body, actor, timeout_s)

    async def Control(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the controller's stream, on which the controller sends the catalog and receives demand and fleet
        reports."""
        first = await self._first_message(context)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must hold hello")
        if not self._peer_identity.may_control(context.peer_certificate()):
            await self._refuse_peer(context, CONTROLLER)
        controller = _Controller(first.hello)
        await context.write(pb.GatewayControlFrame(welcome=self._welcome(codec.PROTOCOL_MAX)))
        self._controller = controller
        log.info("controller_up", controller=controller.controller_id)
        writer = asyncio.create_task(self._report(controller, context))
        try:
            while (frame := await read(context)) is not None:
                if frame.HasField("catalog"):
                    self.catalog_at, self.gateways = time.monotonic(), frame.catalog.gateways
                    self._listener.apply_catalog(_entries(frame.catalog))
                if frame.HasField("admin_reply"):
                    controller.questions.handle_reply(frame.admin_reply)
        finally:
            writer.cancel()
            controller.questions.fail_all()
            if self._controller is controller:
                self._controller = None
                log.info("controller_down", controller=controller.controller_id)

    async def _report(self, controller: _Controller, context: Any) -> None:
        while True:
            await context.write(self._frame())
            due = time.monotonic() + REPORT_S
            while (rest_s := due - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(rest_s):
                        frame = await controller.frames.get()
                except TimeoutError:
                    break
                await context.write(frame)

    def report_now(self) -> None:
        """Report the demand to the controller at once, not with the next periodic report."""
        if self._controller is not None:
            self._controller.frames.put_nowait(self._frame())

    def _frame(self) -> pb.GatewayControlFrame:
        demand = demand_to_pb(self._listener.demand(), time.monotonic() - self._since)
        return pb.GatewayControlFrame(demand=demand, fleet=self._fleet(), tallies=self._tallies())

    def _tallies(self) -> pb.VersionTallies:
        return pb.VersionTallies(
            tallies=[
                pb.VersionTally(
                    model=tally.model,
                    version=tally.version,
                    generation=tally.generation,
                    calls=tally.calls,
                    errors=tally.errors,
                    pairs=tally.pairs,
                    slower=tally.slower,
                )
                for tally in self._listener.version_tallies()
            ]
        )

    def _fleet(self) -> pb.FleetState:
        return pb.FleetState(
            lost=self._lost.to_pb(time.time()),
            workers=[
                pb.FleetWorker(
                    worker_id=link.identity.worker_id,
                    incarnation=link.identity.incarnation,
                    model=link.identity.model,
                    ray_cluster=link.identity.ray_cluster,
                    load=codec.load_to_pb(link.load),
                    weight_digest=link.identity.weight_digest,
                    bundle_digest=link.identity.bundle_digest,
                    max_model_len=link.info.max_model_len,
                    engine_class=link.info.engine_class,
                    default_sampling_json=json.dumps(dict(link.info.default_sampling)),
                    version=link.identity.version,
                    generation=link.identity.generation,
                    standing=codec.drain_state_to_pb(link.drain_state),
                    work=work_to_pb(link.work),
                    max_num_seqs=link.info.max_num_seqs,
                    max_num_batched_tokens=link.info.max_num_batched_tokens,
                    kv_tokens=link.info.kv_tokens,
                )
                for link in self.links
            ],
        )


def _entries(catalog: pb.Catalog) -> list[CatalogEntry]:
    entries = []
    for model in catalog.models:
        try:
            entries.append(codec.entry_from_pb(model))
        except ValueError as error:
            log.warning("catalog_entry_refused", model=model.name, reason=str(error))
    return entries


def hub_server(hub: Hub, admission: http2.ConnectionAdmission | None = None) -> http2.Server:
    """Return a server for the hub's services, which the gateway must start. `admission`: the connection limits of the
    port."""
    server = http2.Server(LIMITS, admission)
    pb_grpc.add_LinkServicer_to_server(hub, server)  # type: ignore[arg-type]
    return server


# These limits are generous: peers are the cluster's own processes, and the link's credit limits what they send.
LIMITS = http2.ServerLimits(
    max_message_bytes=MAX_MESSAGE_BYTES,
    max_calls=256,
    window_bytes=8 << 20,
    connection_window_bytes=32 << 20,
    frame_bytes=1 << 20,
    resets_per_s=1e6,
    resets_burst=1e6,
    max_unsent_bytes=1 << 30,
    ping_s=10.0,
    ping_answer_s=5.0,
)
