"""Opening of a worker's links: the connections to a gateway, the Hello and Welcome, and the heartbeats."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from cluster.api.ports import Engine
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.http2.client import ClientCall
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire import codec
from cluster.wire.bulk import BlobCall
from cluster.wire.dial import HeartbeatSender, LinkEnded, Timing, open_channel, open_client, read
from cluster.wire.outbox import Outbox
from cluster.wire.tls import TlsFiles
from cluster.worker.link_credit import credit_order
from cluster.worker.link_state import LinkState

log = structlog.get_logger("worker")

TURN_METHOD = "/cluster.link.v1.Link/Turn"


@dataclass(frozen=True, slots=True)
class OpenLink:
    """A link that the gateway has welcomed, with its two streams. `hello` is the first blob of the bulk stream."""

    state: LinkState
    welcome: pb.Welcome
    call: ClientCall
    bulk: BlobCall
    hello: pb.Blob


class LinkOpener:
    """Opens the links of one worker. Each link has a new number, the epoch of its Hello."""

    def __init__(
        self,
        identity: WorkerIdentity,
        engine: Engine,
        info: EngineInfo,
        tls: TlsFiles | None,
        timing: Timing,
        outbox_tokens: int,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._info = info
        self._tls = tls
        self._timing = timing
        self._outbox_tokens = outbox_tokens
        self._epochs = itertools.count(1)

    @asynccontextmanager
    async def open(self, address: str) -> AsyncIterator[OpenLink]:
        """Open a link to the gateway at `host:port`; the caller stops the heartbeats. Raises LinkEnded."""
        identity, epoch = self._identity, next(self._epochs)
        async with open_client(address, self._tls) as client, open_channel(address, self._tls) as bulk_channel:
            metadata = (("x-headrace-worker", identity.worker_id),)
            call = client.call(TURN_METHOD, pb.WorkerTurn.SerializeToString, pb.GatewayTurn.FromString, metadata)
            await call.write(pb.WorkerTurn(hello=codec.hello_to_pb(identity, self._info, epoch)))
            welcome = await self._read_welcome(call)
            log.info("link_up", gateway=welcome.gateway_id, address=address, epoch=epoch)
            outbox = Outbox(self._outbox_tokens)
            state = LinkState(
                epoch,
                credit_order(identity.worker_id, welcome.incarnation, epoch),
                welcome.gateway_id,
                welcome.incarnation,
                outbox,
                HeartbeatSender(address, self._tls, lambda seq: self._beat(epoch, seq, outbox), self._timing.beat_s),
            )
            bulk = pb_grpc.LinkStub(bulk_channel).Bulk()
            hello = pb.Blob(worker_id=identity.worker_id, incarnation=identity.incarnation, epoch=epoch)
            try:
                yield OpenLink(state, welcome, call, bulk, hello)
            finally:
                call.cancel()

    async def _read_welcome(self, call: ClientCall) -> pb.Welcome:
        try:
            async with asyncio.timeout(self._timing.welcome_s):
                first = await read(call)
        except TimeoutError:
            raise LinkEnded(f"no welcome within {self._timing.welcome_s} s") from None
        if first is None or not first.HasField("welcome"):
            raise LinkEnded("the gateway did not welcome this worker")
        welcome: pb.Welcome = first.welcome
        return welcome

    def _beat(self, epoch: int, seq: int, outbox: Outbox) -> pb.WorkerBeat:
        """Build a heartbeat. Runs in the thread of the heartbeats."""
        return pb.WorkerBeat(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            epoch=epoch,
            seq=seq,
            load=codec.load_to_pb(self._engine.load()),
            acked_seq=outbox.acked_seq,
            sent_seq=outbox.sent_seq,
        )
