"""A link between a worker and a gateway: how the link is opened, its requests by slot, its outgoing data and its
tasks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.ports import Engine, EngineRefused
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.http2.client import ClientCall
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bulk import Prompts, serve_bulk
from cluster.wire.codecs import codec
from cluster.wire.dial import HeartbeatSender, LinkEnded, Timing, open_channel, open_client, read
from cluster.wire.outbox import Outbox
from cluster.wire.tls import TlsFiles
from cluster.worker.link_credit import credit_order

log = structlog.get_logger("worker")

TURN_METHOD = "/cluster.link.v1.Link/Turn"


@dataclass(eq=False, slots=True)
class Link:
    """An open link of a worker to a gateway. An abort may arrive while the Submit of the same slot is still in
    progress.

    Such an abort is applied when the Submit finishes. If the Submit waits for an adapter, the abort ends this wait.
    """

    number: int
    credit_order: int
    """Sort key of the links among which capacity is divided (link_credit.py). The links with the lowest keys get the
    remainder."""
    gateway: str
    incarnation: str
    """Incarnation of the gateway."""
    accounts: bool
    """Whether the gateway writes to the ledger."""
    outbox: Outbox
    heartbeats: HeartbeatSender
    requests: dict[int, str] = field(default_factory=dict)
    """Engine request ids by slot."""
    prompts: Prompts = field(default_factory=Prompts)
    blobs: asyncio.Queue[pb.Blob] = field(default_factory=lambda: asyncio.Queue(maxsize=64))
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _submitting: set[int] = field(default_factory=set)
    _aborted: set[int] = field(default_factory=set)
    _waits: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    def begin_submit(self, slot: int, request_id: str) -> None:
        """Record that a Submit begins. It is in progress until `finish_submit` or `refuse`."""
        self.requests[slot] = request_id
        self._submitting.add(slot)

    def finish_submit(self, slot: int) -> bool:
        """Record that a Submit has finished; return whether an abort arrived while the Submit was in progress."""
        self._submitting.discard(slot)
        if slot not in self._aborted:
            return False
        self._aborted.discard(slot)
        return True

    def is_submitting(self, slot: int) -> bool:
        """Return whether a Submit for this slot is in progress."""
        return slot in self._submitting

    async def wait(self, slot: int, work: Coroutine[None, None, None]) -> None:
        """Run `work`, on which a Submit in progress depends, and wait for it. Errors of `work` are raised.

        If the Submit is aborted, `work` is cancelled and EngineRefused is raised.
        """
        task = self._waits[slot] = asyncio.create_task(work)
        try:
            await task
        except asyncio.CancelledError:
            own = asyncio.current_task()
            if slot not in self._aborted or (own is not None and own.cancelling()):
                raise
            raise EngineRefused(Outcome.CANCELLED.name, "the call ended while it waited for its adapter") from None
        finally:
            del self._waits[slot]

    def request_to_abort(self, slot: int) -> str | None:
        """Return the engine request id that the caller must abort now; None if there is none.

        There is none if the request has already ended, or if its Submit is in progress. In the latter case
        `finish_submit` later returns True.
        """
        if slot in self._submitting:
            self._aborted.add(slot)
            if (wait := self._waits.get(slot)) is not None:
                wait.cancel()
            return None
        return self.requests.get(slot)

    def refuse(self, slot: int, reason: str, message: str, field_name: str = "") -> None:
        """Forget a Submit, and report to the gateway that the worker refuses it."""
        self.requests.pop(slot, None)
        self._submitting.discard(slot)
        self._aborted.discard(slot)
        self.outbox.refused(slot, reason, message, field_name)

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` in a task of this link. The task is cancelled when the link ends."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)


@dataclass(frozen=True, slots=True)
class LinkOpener:
    """Opens the links of one worker. Each link gets a new number, which is also the epoch in its Hello message."""

    identity: WorkerIdentity
    engine: Engine
    info: EngineInfo
    tls: TlsFiles | None
    timing: Timing
    outbox_tokens: int
    gateways: GatewayAddresses
    _epochs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @asynccontextmanager
    async def open(self, address: str) -> AsyncIterator[tuple[Link, ClientCall, Coroutine[None, None, None]]]:
        """Yield a link to the gateway at `host:port`, the link's gRPC call, and a coroutine that serves its bulk
        stream.

        The caller must run the coroutine, and stop the link's heartbeats when the link ends. Raises LinkEnded.
        """
        identity, epoch = self.identity, next(self._epochs)
        async with open_client(address, self.tls) as client, open_channel(address, self.tls) as bulk_channel:
            metadata = (("x-headrace-worker", identity.worker_id),)
            call = client.call(TURN_METHOD, pb.WorkerTurn.SerializeToString, pb.GatewayTurn.FromString, metadata)
            await call.write(pb.WorkerTurn(hello=codec.hello_to_pb(identity, self.info, epoch)))
            welcome = await self._read_welcome(call)
            log.info("link.connected", gateway=welcome.gateway_id, address=address, epoch=epoch)
            self.gateways.record_welcome(address, welcome.incarnation, welcome.siblings)
            outbox = Outbox(self.outbox_tokens)
            outbox.part_columns = welcome.part_columns
            link = Link(
                epoch,
                credit_order(identity.worker_id, welcome.incarnation, epoch),
                welcome.gateway_id,
                welcome.incarnation,
                welcome.accounts,
                outbox,
                HeartbeatSender(address, self.tls, lambda seq: self._beat(epoch, seq, outbox), self.timing.beat_s),
            )
            hello = pb.Blob(worker_id=identity.worker_id, incarnation=identity.incarnation, epoch=epoch)
            try:
                yield link, call, serve_bulk(pb_grpc.LinkStub(bulk_channel).Bulk(), hello, link.prompts, link.blobs)
            finally:
                call.cancel()

    async def _read_welcome(self, call: ClientCall) -> pb.Welcome:
        try:
            async with asyncio.timeout(self.timing.welcome_s):
                first = await read(call)
        except TimeoutError:
            raise LinkEnded(f"no welcome within {self.timing.welcome_s} s") from None
        if first is None or not first.HasField("welcome"):
            raise LinkEnded("the gateway did not welcome this worker")
        welcome: pb.Welcome = first.welcome
        return welcome

    def _beat(self, epoch: int, seq: int, outbox: Outbox) -> pb.WorkerBeat:
        """Build a heartbeat. Runs in the thread of the heartbeats."""
        return pb.WorkerBeat(
            worker_id=self.identity.worker_id,
            incarnation=self.identity.incarnation,
            epoch=epoch,
            seq=seq,
            load=codec.load_to_pb(self.engine.load()),
            acked_seq=outbox.acked_seq,
            sent_seq=outbox.sent_seq,
        )
