"""Controller side of the links: sends the catalog to every gateway and receives demand and worker reports."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from cluster.api.demand import ComputedWork, ModelDemand
from cluster.api.pooling import PoolingTask, known_tasks
from cluster.api.types import CatalogEntry, DrainState, VersionTally
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.policy.problems import Problem
from cluster.wire import admin_forwarding, lost_engines
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bulk import Prompts, send_bundle, serve_bulk
from cluster.wire.bundle import Bundle
from cluster.wire.codecs import codec
from cluster.wire.codecs.demand_codec import demand_from_pb, problems_to_pb, work_from_pb
from cluster.wire.dial import LinkEnded, Timing, open_channel, read
from cluster.wire.lost_engines import LostEngine
from cluster.wire.tls import TlsFiles

IDLE_S = 2.0
GONE_S = 5.0


@dataclass(frozen=True, slots=True)
class FleetWorker:
    """Identity, limits and load of a worker, as reported by a gateway."""

    worker_id: str
    incarnation: str
    model: str
    ray_cluster: str = ""
    weight_digest: str = ""
    bundle_digest: str = ""
    max_model_len: int = 0
    engine_class: str = ""
    running: int = 0
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    version: str = ""
    generation: str = ""
    kv_usage: float = 0.0
    drain_state: DrainState = DrainState.SERVING
    work: ComputedWork = field(default_factory=ComputedWork)
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    kv_tokens: int = 0
    tasks: tuple[PoolingTask, ...] = ()
    adapters_ready: int = 0
    """Number of adapters that the worker has loaded."""


class DemandListener(Protocol):
    """Receiver of the gateways' demand reports. `gateway`: the incarnation of the gateway that sent a report."""

    def record_demand(self, gateway: str, demand: Sequence[ModelDemand], counting_s: float) -> None:
        """Record a gateway's demand. `counting_s`: seconds over which the gateway has counted."""

    def record_disconnect(self, gateway: str) -> None:
        """Record that the link to a gateway has ended."""


@dataclass(slots=True)
class _GatewayReports:
    """The newest reports of a linked gateway."""

    fleet: Sequence[FleetWorker] = ()
    lost: Sequence[LostEngine] = ()
    demand: Sequence[ModelDemand] = ()
    tallies: Sequence[VersionTally] = ()

    def apply(self, frame: pb.GatewayControlFrame) -> None:
        """Replace the stored reports by the newer reports in a frame from the gateway."""
        if frame.HasField("fleet"):
            self.fleet = [_worker(w) for w in frame.fleet.workers]
            self.lost = lost_engines.from_pb(frame.fleet.lost)
        if frame.HasField("demand"):
            self.demand = demand_from_pb(frame.demand)
        if frame.HasField("tallies"):
            self.tallies = [
                VersionTally(t.model, t.version, t.generation, t.calls, t.errors, t.pairs, t.slower)
                for t in frame.tallies.tallies
            ]


class ControllerLinks:
    """Links from the controller to the gateways. Dials the gateways in `gateways` and the other gateway processes on
    their hosts, and sends the newest catalog to each."""

    def __init__(
        self,
        *,
        controller_id: str,
        gateways: Sequence[str],
        tls: TlsFiles | None,
        bundles: Callable[[str], Bundle | None],
        listener: DemandListener | None = None,
        verbs: Mapping[str, admin_forwarding.Verb] | None = None,
        timing: Timing | None = None,
        wall_s: Callable[[], float] = time.time,
        idle_s: float = IDLE_S,
    ) -> None:
        """`bundles`: function that returns a tokenizer bundle by digest. `verbs`: handlers of the admin verbs that the
        controller answers, by names such as `Catalog.Scale`. `wall_s` returns seconds since the epoch. After `idle_s`
        seconds without a change of the catalog, an empty frame is sent."""
        self._idle_s = idle_s
        self._controller_id = controller_id
        self._incarnation = uuid.uuid4().hex[:12]
        self._gateways = GatewayAddresses(gateways)
        self._tls = tls
        self._bundles = bundles
        self._listener = listener
        self._verbs = {} if verbs is None else verbs
        self._timing = timing or Timing()
        self._catalog: tuple[CatalogEntry, ...] = ()
        self._revision = 0
        self._operator_state: pb.OperatorState | None = None
        self._problems: Sequence[Problem] = ()
        self._wall_s = wall_s
        self._changed: set[asyncio.Event] = set()
        self._reports: dict[str, _GatewayReports] = {}
        self._heard_at: dict[str, float] = {}
        """Monotonic time of the last frame of each gateway, by its address."""
        self._answers: set[asyncio.Task[None]] = set()

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Send the catalog to every gateway if the catalog has changed."""
        if tuple(entries) == self._catalog and self._revision:
            return
        self._catalog = tuple(entries)
        # Workers follow the highest revision that they have seen, so it must grow over a restart of the controller too.
        self._revision = max(self._revision + 1, round(self._wall_s() * 1000))
        self._notify_all()

    def set_operator_state(self, state: pb.OperatorState | None) -> None:
        """Send the operators' changes to every gateway. Each gateway keeps the changes for the next controller.

        None means that operators have changed nothing.
        """
        self._operator_state = state
        self._notify_all()

    def set_problems(self, problems: Sequence[Problem]) -> None:
        """Send the faults that the controller sees to every gateway, if they have changed."""
        if problems != self._problems:
            self._problems = problems
            self._notify_all()

    def unreachable_gateways(self, now: float) -> Sequence[tuple[str, str]]:
        """Return the addresses of the gateways that were linked and have sent nothing for GONE_S, each with the reason.
        A gateway whose address is no longer configured, or in DNS, has left. `now`: monotonic seconds."""
        return [
            (address, "it has ended, or cannot be reached" if address not in self._reports else "it is frozen")
            for address, heard_at in self._heard_at.items()
            if address in self._gateways.addresses and now - heard_at > GONE_S
        ]

    def _notify_all(self) -> None:
        """Wake the task of each link. The task then sends the catalog to the gateway of the link."""
        for event in self._changed:
            event.set()

    def fleet(self) -> Sequence[FleetWorker]:
        """Return one FleetWorker for each worker that is linked to at least one gateway, sorted by worker id."""
        return _merge_fleets([reports.fleet for reports in self._reports.values()])

    def lost(self) -> Sequence[LostEngine]:
        """Return the engines that ended in the last few minutes, oldest first."""
        return lost_engines.merge_reports([reports.lost for reports in self._reports.values()])

    def demand(self) -> Sequence[ModelDemand]:
        """Return the demand by model, summed over the gateways."""
        return _add_demands([reports.demand for reports in self._reports.values()])

    def tallies(self) -> Sequence[VersionTally]:
        """Return the call counts of model versions: one VersionTally for each version and linked gateway."""
        return [tally for address in sorted(self._reports) for tally in self._reports[address].tallies]

    @property
    def linked(self) -> int:
        """Number of gateways that this controller is linked to."""
        return len(self._changed)

    async def run(self) -> None:
        """Dial the gateways until cancelled."""
        await self._gateways.dial(self._session, self._timing)

    async def _session(self, address: str) -> None:
        async with open_channel(address, self._tls) as channel, open_channel(address, self._tls) as bulk_channel:
            call: Any = pb_grpc.LinkStub(channel).Control()
            hello = pb.ControllerHello(
                protocol_min=codec.PROTOCOL_MIN,
                protocol_max=codec.PROTOCOL_MAX,
                controller_id=self._controller_id,
                incarnation=self._incarnation,
                verbs=sorted(self._verbs),
            )
            await call.write(pb.ControllerFrame(hello=hello))
            async with asyncio.timeout(self._timing.welcome_s):
                first = await read(call)
            if first is None or not first.HasField("welcome"):
                raise LinkEnded("the gateway did not welcome this controller")
            gateway = first.welcome.incarnation
            self._gateways.record_welcome(address, gateway, first.welcome.siblings)
            changed = asyncio.Event()
            changed.set()
            self._changed.add(changed)
            reports = self._reports[address] = _GatewayReports()
            self._notify_all()
            blobs: asyncio.Queue[pb.Blob] = asyncio.Queue(maxsize=64)
            replies: asyncio.Queue[pb.AdminReply] = asyncio.Queue()
            write_lock = asyncio.Lock()  # a gRPC stream accepts one write at a time
            tasks = [
                asyncio.create_task(self._send_catalog(call, changed, write_lock)),
                asyncio.create_task(self._send_replies(call, replies, write_lock)),
                asyncio.create_task(self._receive(address, reports, gateway, call, blobs, replies)),
                asyncio.create_task(
                    serve_bulk(pb_grpc.LinkStub(bulk_channel).Bulk(), self._blob_hello(), Prompts(), blobs)
                ),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                self._changed.discard(changed)
                self._notify_all()
                self._reports.pop(address, None)
                if self._listener is not None:
                    self._listener.record_disconnect(gateway)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()

    def _blob_hello(self) -> pb.Blob:
        return pb.Blob(worker_id=f"controller:{self._controller_id}", incarnation=self._incarnation)

    async def _send_catalog(self, call: Any, changed: asyncio.Event, write_lock: asyncio.Lock) -> None:
        """Send the catalog at each change. Between changes, send empty frames, which show that the controller runs."""
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    await changed.wait()
            except TimeoutError:
                async with write_lock:
                    await call.write(pb.ControllerFrame(sent_at_s=self._wall_s()))
                continue
            changed.clear()
            if not self._revision:
                continue
            catalog = pb.Catalog(
                revision=self._revision,
                models=[codec.entry_to_pb(e) for e in self._catalog],
                gateways=self.linked,
                operator_state=self._operator_state,
                problems=problems_to_pb(self._problems),
            )
            async with write_lock:
                await call.write(pb.ControllerFrame(catalog=catalog, sent_at_s=self._wall_s()))

    async def _send_replies(self, call: Any, replies: asyncio.Queue[pb.AdminReply], write_lock: asyncio.Lock) -> None:
        while True:
            reply = await replies.get()
            async with write_lock:
                await call.write(pb.ControllerFrame(admin_reply=reply))

    async def _receive(
        self,
        address: str,
        reports: _GatewayReports,
        gateway: str,
        call: Any,
        blobs: asyncio.Queue[pb.Blob],
        replies: asyncio.Queue[pb.AdminReply],
    ) -> None:
        while (frame := await read(call)) is not None:
            reports.apply(frame)
            self._heard_at[address] = time.monotonic()
            if frame.HasField("demand") and self._listener is not None:
                self._listener.record_demand(gateway, reports.demand, frame.demand.counting_s)
            if frame.HasField("fetch_bundle"):
                digest = frame.fetch_bundle.digest
                bundle = await asyncio.to_thread(self._bundles, digest)
                await send_bundle(blobs, digest, bundle)
            if frame.HasField("admin_request"):
                task = asyncio.create_task(self._answer(frame.admin_request, replies))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)

    async def _answer(self, request: pb.AdminRequest, replies: asyncio.Queue[pb.AdminReply]) -> None:
        """Carry out an admin request, even if the link's stream ends meanwhile.

        If the stream ends, the gateway reports to the caller that the request may have been carried out.
        """
        replies.put_nowait(await admin_forwarding.answer(self._verbs, request))


def _merge_fleets(fleets: Iterable[Sequence[FleetWorker]]) -> Sequence[FleetWorker]:
    """Return one FleetWorker for each worker in the gateways' reports, from the newest report, sorted by worker id."""
    workers: dict[str, FleetWorker] = {}
    for worker in chain.from_iterable(fleets):
        other = workers.get(worker.worker_id)
        if other is None or other.work.steps <= worker.work.steps:  # the newest report
            workers[worker.worker_id] = worker
    return [workers[key] for key in sorted(workers)]


def _add_demands(demands: Iterable[Sequence[ModelDemand]]) -> Sequence[ModelDemand]:
    """Return the demand by model, summed over the gateways' reports and sorted by model."""
    sums: dict[str, ModelDemand] = {}
    for demand in chain.from_iterable(demands):
        total = sums.get(demand.model, ModelDemand(demand.model, 0, 0, 0, 0, 0))
        sums[demand.model] = ModelDemand(
            demand.model,
            total.waiting + demand.waiting,
            total.waiting_tokens + demand.waiting_tokens,
            total.running + demand.running,
            total.arrived + demand.arrived,
            total.arrived_tokens + demand.arrived_tokens,
        )
    return [sums[key] for key in sorted(sums)]


def _worker(w: pb.FleetWorker) -> FleetWorker:
    return FleetWorker(
        worker_id=w.worker_id,
        incarnation=w.incarnation,
        model=w.model,
        ray_cluster=w.ray_cluster,
        weight_digest=w.weight_digest,
        bundle_digest=w.bundle_digest,
        max_model_len=w.max_model_len,
        engine_class=w.engine_class,
        running=w.load.running,
        kv_usage=w.load.kv_usage,
        drain_state=DrainState.SERVING if not w.standing else codec.drain_state_from_pb(pb.Standing(state=w.standing)),
        work=work_from_pb(w.work),
        max_num_seqs=w.max_num_seqs,
        max_num_batched_tokens=w.max_num_batched_tokens,
        kv_tokens=w.kv_tokens,
        default_sampling=json.loads(w.default_sampling_json or "{}"),
        version=w.version,
        generation=w.generation,
        tasks=known_tasks(w.tasks),
        adapters_ready=w.adapters_ready,
    )
