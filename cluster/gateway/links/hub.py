"""The gateway's server for links. The server authorizes workers and the controller, and passes their streams to
WorkerLinks, CurrentController and BundleFetches."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from cluster import http2
from cluster.api.demand import ModelDemand
from cluster.api.types import VersionTally
from cluster.gateway.links.bundle_fetches import BundleFetches
from cluster.gateway.links.controller import CurrentController, tallies_to_pb, worker_to_pb
from cluster.gateway.links.kept_state import KeptOperatorState
from cluster.gateway.links.peer_identity import LinkPeer, PeerIdentity
from cluster.gateway.links.report_costs import HELLO
from cluster.gateway.links.starting_workers import StartingWorkers
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.links.worker_links import HubListener, WorkerLinks
from cluster.http2.limits import Bucket
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.codecs import codec
from cluster.wire.codecs.demand_codec import demand_to_pb
from cluster.wire.dial import Timing, read
from cluster.wire.link_bounds import MAX_MESSAGE_BYTES, check, parser

log = structlog.get_logger("hub")

BEATS_PER_S = 200.0
"""Maximum rate at which the messages of one heartbeat stream, or of one starting worker, are read. Workers send ten."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """Counts of a hub: worker links, requests that run on these links, and controllers."""

    workers: int
    running: int
    controllers: int


class Hub(pb_grpc.LinkServicer):
    """Server of the gRPC service cluster.link.v1.Link. The methods read and write messages through `context`. Their
    signatures therefore differ from the generated stubs, in which a method is a generator."""

    def __init__(
        self,
        gateway_id: str,
        listener: HubListener,
        demand: Callable[[], Sequence[ModelDemand]],
        tallies: Callable[[], Sequence[VersionTally]],
        timing: Timing | None = None,
        siblings: Sequence[str] = (),
        by_certificate: bool = False,
        folder: Path | None = None,
    ) -> None:
        """`demand` returns the demand for each model, and `tallies` the canary statistics; both are reported to the
        controller. `siblings`: link addresses of the other gateway processes of this host, which share the client
        ports. `by_certificate`: whether the port has TLS. With TLS, a peer's certificate must name the peer's role.
        `folder`: the gateway's folder, for the operator state."""
        self.gateway_id = gateway_id
        self._siblings = tuple(siblings)
        self.incarnation = uuid.uuid4().hex[:12]
        self._since = time.monotonic()
        self._listener = listener
        self._demand = demand
        self._tallies = tallies
        self._peer_identity = PeerIdentity(by_certificate)
        self._timing = timing or Timing()
        self._operator_state = KeptOperatorState(folder)
        self.controller = CurrentController(listener.apply_catalog, self._report, self._operator_state.keep)
        self.bundles = BundleFetches(self._bundle_holder, self.controller.request_bundle)
        self.starting = StartingWorkers()
        self.workers = WorkerLinks(listener, self._timing, self.bundles.request_again)

    def statistics(self) -> HubStatistics:
        """Return the current counts."""
        links = self.links
        return HubStatistics(len(links), sum(link.running for link in links), int(self.controller.connected))

    @property
    def links(self) -> Sequence[WorkerLink]:
        """All worker links that are up, sorted by worker id."""
        return self.workers.links

    def _bundle_holder(self, digest: str) -> WorkerLink | None:
        return next((link for link in self.links if link.identity.bundle_digest == digest), None)

    def _report(self) -> pb.GatewayControlFrame:
        """Return the report for the controller."""
        return pb.GatewayControlFrame(
            demand=demand_to_pb(self._demand(), time.monotonic() - self._since),
            fleet=pb.FleetState(
                lost=self.workers.lost.to_pb(time.time()), workers=[worker_to_pb(link) for link in self.links]
            ),
            tallies=tallies_to_pb(self._tallies()),
        )

    # ---- the service

    async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve one connection (epoch) of a worker, from the worker's Hello message to the end of the link."""
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
            check(hello)
            identity, info = codec.hello_from_pb(hello)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"hello: {error}")
        await LinkPeer(context, self._peer_identity).require_worker(
            identity, hello.epoch, self.workers.with_id(identity.worker_id)
        )
        if why := self._listener.refusal_of(identity):
            log.warning("worker.refused", worker=identity.worker_id, model=identity.model, reason=why)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"hello: {why}")
        await self.workers.costs.spend(identity.model, HELLO)
        link = await self.workers.serve(identity, info, hello.epoch, context, self._welcome(protocol))
        if link.closed.is_set():  # a cancelled handler would leave the worker without a status
            await context.abort(grpc.StatusCode.UNAVAILABLE, link.why)

    async def _first_message(self, context: Any) -> Any:
        """Return the first message of a stream; None if no message arrives within `welcome_s`."""
        try:
            async with asyncio.timeout(self._timing.welcome_s):
                return await read(context)
        except TimeoutError:
            return None

    def _welcome(self, protocol: int) -> pb.Welcome:
        return pb.Welcome(
            protocol=protocol,
            gateway_id=self.gateway_id,
            incarnation=self.incarnation,
            siblings=self._siblings,
            accounts=self._listener.keeps_accounts,
            part_columns=True,
        )

    async def Beat(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the heartbeats of one worker. Each heartbeat is answered with a GatewayBeat."""
        peer = LinkPeer(context, self._peer_identity)
        link: WorkerLink | None = None
        pace = Bucket(BEATS_PER_S, BEATS_PER_S, time.monotonic())
        while (beat := await read(context)) is not None:
            if link is None or link.ended:
                link = await peer.permitted(self.workers.find(beat.worker_id, beat.incarnation, beat.epoch))
            if link is not None:
                self.workers.apply_beat(link, beat)
            await context.write(pb.GatewayBeat(seq=beat.seq))
            if pace.charge(1, time.monotonic()) < 0:
                await asyncio.sleep(pace.delay_s())

    async def Bulk(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the stream of large data, such as prompts and bundles, to and from one worker or controller."""
        hello = await self._first_message(context)
        if hello is None or not hello.worker_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first blob must hold worker_id")
        blobs: asyncio.Queue[pb.Blob] = asyncio.Queue()
        peer = LinkPeer(context, self._peer_identity)
        links = self.workers.find(hello.worker_id, hello.incarnation, hello.epoch)
        if (link := await peer.permitted(links, "its worker's model")) is not None:
            link.bulk.open(blobs)
        else:
            await peer.require_controller("a worker that is linked, or the controller")
        writer = asyncio.create_task(_write_blobs(blobs, context))
        parts: dict[str, bytearray] = {}
        try:
            while (blob := await read(context)) is not None:
                self.bundles.receive(parts, blob)
        finally:
            writer.cancel()

    async def Starting(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Receive the reports of a worker that is still starting, until the stream ends."""
        stream = self.starting.new_stream()
        peer = LinkPeer(context, self._peer_identity)
        pace = Bucket(BEATS_PER_S, BEATS_PER_S, time.monotonic())
        try:
            while (message := await read(context)) is not None:
                await peer.require_model(message.model)
                self.starting.report(stream, message)
                if pace.charge(1, time.monotonic()) < 0:
                    await asyncio.sleep(pace.delay_s())
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"starting: {error}")
        finally:
            self.starting.end(stream)

    async def Control(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
        """Serve the controller's stream, on which the controller sends the catalog and receives demand and fleet
        reports."""
        first = await self._first_message(context)
        if first is None or not first.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first frame must hold hello")
        await LinkPeer(context, self._peer_identity).require_controller()
        await context.write(pb.GatewayControlFrame(welcome=self._welcome(codec.PROTOCOL_MAX)))
        await self.controller.serve(first.hello, context)

    async def ReadOperatorState(self, request: object, context: Any) -> pb.OperatorState:
        """Return the operator state that a controller sent last. Only a controller may read this state."""
        await LinkPeer(context, self._peer_identity).require_controller()
        return self._operator_state.newest


async def _write_blobs(blobs: asyncio.Queue[pb.Blob], context: Any) -> None:
    while True:
        await context.write(await blobs.get())


def hub_server(hub: Hub, admission: http2.ConnectionAdmission | None = None) -> http2.Server:
    """Return a server for the hub's services. The caller must start the server. `admission`: the connection limits of
    the port."""
    server = http2.Server(LIMITS, admission)
    service = pb.DESCRIPTOR.services_by_name["Link"]
    handlers = {}
    for method in service.methods:
        kind, answer = getattr(pb, method.input_type.name), getattr(pb, method.output_type.name)
        handler = (
            grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        )
        handlers[method.name] = handler(getattr(hub, method.name), parser(kind), answer.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    return server


# wire/link_bounds.py has the bounds of the messages. The largest message fits into a connection's window.
LIMITS = http2.ServerLimits(
    max_message_bytes=max(MAX_MESSAGE_BYTES.values()),
    max_calls=32,
    window_bytes=8 << 20,
    connection_window_bytes=32 << 20,
    frame_bytes=1 << 20,
    resets_per_s=1e6,
    resets_burst=1e6,
    max_unsent_bytes=1 << 30,
    ping_s=10.0,
    ping_answer_s=5.0,
)
