"""The controller's end of its links: the catalog goes to every gateway, demand and fleet come back."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.api.demand import ComputedWork, ModelDemand
from cluster.api.types import CatalogEntry, DrainState, VersionTally
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire import admin_forwarding, codec, lost_engines
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bulk import Prompts, send_bundle, serve_bulk
from cluster.wire.bundle import Bundle
from cluster.wire.demand_codec import demand_from_pb, work_from_pb
from cluster.wire.dial import LinkEnded, Timing, open_channel, read
from cluster.wire.lost_engines import LostEngine
from cluster.wire.tls import TlsFiles


@dataclass(frozen=True, slots=True)
class FleetWorker:
    """A worker as some gateway sees it."""

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
    standing: DrainState = DrainState.SERVING
    work: ComputedWork = field(default_factory=ComputedWork)
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    kv_tokens: int = 0


class ControllerLinks:
    """Dials every gateway in `gateways` and their siblings, and keeps each told of the newest catalog."""

    def __init__(
        self,
        *,
        controller_id: str,
        gateways: Sequence[str],
        tls: TlsFiles | None,
        bundles: Callable[[str], Bundle | None],
        timing: Timing | None = None,
    ) -> None:
        self._controller_id = controller_id
        self._incarnation = uuid.uuid4().hex[:12]
        self._gateways = GatewayAddresses(gateways)
        self._tls = tls
        self._bundles = bundles
        self._timing = timing or Timing()
        self._catalog: tuple[CatalogEntry, ...] = ()
        self._revision = 0
        self._changed: set[asyncio.Event] = set()
        self._fleets: dict[str, Sequence[FleetWorker]] = {}
        self._lost: dict[str, Sequence[LostEngine]] = {}
        self._demands: dict[str, Sequence[ModelDemand]] = {}
        self._tallies: dict[str, Sequence[VersionTally]] = {}
        self.on_demand: Callable[[str, Sequence[ModelDemand], float], None] = lambda gateway, demand, counting_s: None
        """Told what a gateway's incarnation says, and for how long it has counted (seconds)."""
        self.on_left: Callable[[str], None] = lambda gateway: None
        """Told that the link to a gateway's incarnation has ended."""
        self.verbs: dict[str, admin_forwarding.Verb] = {}
        """Admin verbs that are answered here (`Catalog.Scale`); set before `run`."""
        self._answers: set[asyncio.Task[None]] = set()

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """The newest catalog; sent to every gateway unless nothing changed."""
        if tuple(entries) == self._catalog and self._revision:
            return
        self._catalog = tuple(entries)
        self._revision += 1
        self._tell_all()

    def _tell_all(self) -> None:
        """Send the catalog again: it has changed, or the number of gateways that are linked."""
        for event in self._changed:
            event.set()

    def fleet(self) -> Sequence[FleetWorker]:
        """Workers that some gateway has a link to, one entry each, by id."""
        workers: dict[str, FleetWorker] = {}
        for worker in (w for fleet in self._fleets.values() for w in fleet):
            other = workers.get(worker.worker_id)
            if other is None or other.work.steps <= worker.work.steps:  # the newest of what is told of it
                workers[worker.worker_id] = worker
        return [workers[key] for key in sorted(workers)]

    def lost(self) -> Sequence[LostEngine]:
        """Engines that ended in the last minutes, the oldest first."""
        return lost_engines.merged(self._lost.values())

    def demand(self) -> Sequence[ModelDemand]:
        """Demand by model, summed over the gateways."""
        sums: dict[str, ModelDemand] = {}
        for demands in self._demands.values():
            for d in demands:
                o = sums.get(d.model, ModelDemand(d.model, 0, 0, 0, 0, 0))
                sums[d.model] = ModelDemand(
                    d.model,
                    o.waiting + d.waiting,
                    o.waiting_tokens + d.waiting_tokens,
                    o.running + d.running,
                    o.arrived + d.arrived,
                    o.arrived_tokens + d.arrived_tokens,
                )
        return [sums[key] for key in sorted(sums)]

    def tallies(self) -> Sequence[VersionTally]:
        """What each gateway that is linked now has counted of versions; several of one version, one a gateway."""
        return [tally for address in sorted(self._tallies) for tally in self._tallies[address]]

    @property
    def linked(self) -> int:
        """Gateways this controller has a link to now."""
        return len(self._changed)

    async def run(self) -> None:
        """Dial until cancelled."""
        await self._gateways.dial(self._session, self._timing)

    async def _session(self, address: str) -> None:
        async with open_channel(address, self._tls) as channel, open_channel(address, self._tls) as bulk_channel:
            call: Any = pb_grpc.LinkStub(channel).Control()
            hello = pb.ControllerHello(
                protocol_min=codec.PROTOCOL_MIN,
                protocol_max=codec.PROTOCOL_MAX,
                controller_id=self._controller_id,
                incarnation=self._incarnation,
                verbs=sorted(self.verbs),
            )
            await call.write(pb.ControllerFrame(hello=hello))
            async with asyncio.timeout(self._timing.welcome_s):
                first = await read(call)
            if first is None or not first.HasField("welcome"):
                raise LinkEnded("the gateway did not welcome this controller")
            gateway = first.welcome.incarnation
            self._gateways.welcomed(address, gateway, first.welcome.siblings)
            changed = asyncio.Event()
            changed.set()
            self._changed.add(changed)
            self._tell_all()
            blobs: asyncio.Queue[pb.Blob] = asyncio.Queue(maxsize=64)
            replies: asyncio.Queue[pb.AdminReply] = asyncio.Queue()
            turn = asyncio.Lock()  # a stream takes one message at a time
            parts = [
                asyncio.create_task(self._tell(call, changed, turn)),
                asyncio.create_task(self._reply(call, replies, turn)),
                asyncio.create_task(self._listen(address, gateway, call, blobs, replies)),
                asyncio.create_task(
                    serve_bulk(pb_grpc.LinkStub(bulk_channel).Bulk(), self._blob_hello(), Prompts(), blobs)
                ),
            ]
            try:
                done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                for part in done:
                    part.result()
            finally:
                self._changed.discard(changed)
                self._tell_all()
                self._fleets.pop(address, None)
                self._lost.pop(address, None)
                self._demands.pop(address, None)
                self._tallies.pop(address, None)
                self.on_left(gateway)
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)
                call.cancel()

    def _blob_hello(self) -> pb.Blob:
        return pb.Blob(worker_id=f"controller:{self._controller_id}", incarnation=self._incarnation)

    async def _tell(self, call: Any, changed: asyncio.Event, turn: asyncio.Lock) -> None:
        while True:
            await changed.wait()
            changed.clear()
            if not self._revision:
                continue
            catalog = pb.Catalog(
                revision=self._revision,
                models=[codec.entry_to_pb(e) for e in self._catalog],
                gateways=self.linked,
            )
            async with turn:
                await call.write(pb.ControllerFrame(catalog=catalog))

    async def _reply(self, call: Any, replies: asyncio.Queue[pb.AdminReply], turn: asyncio.Lock) -> None:
        while True:
            reply = await replies.get()
            async with turn:
                await call.write(pb.ControllerFrame(admin_reply=reply))

    async def _listen(
        self,
        address: str,
        gateway: str,
        call: Any,
        blobs: asyncio.Queue[pb.Blob],
        replies: asyncio.Queue[pb.AdminReply],
    ) -> None:
        while (frame := await read(call)) is not None:
            if frame.HasField("fleet"):
                self._fleets[address] = [_worker(w) for w in frame.fleet.workers]
                self._lost[address] = lost_engines.from_pb(frame.fleet.lost)
            if frame.HasField("demand"):
                demand = self._demands[address] = demand_from_pb(frame.demand)
                self.on_demand(gateway, demand, frame.demand.counting_s)
            if frame.HasField("tallies"):
                self._tallies[address] = [
                    VersionTally(t.model, t.version, t.generation, t.calls, t.errors, t.pairs, t.slower)
                    for t in frame.tallies.tallies
                ]
            if frame.HasField("fetch_bundle"):
                digest = frame.fetch_bundle.digest
                bundle = await asyncio.to_thread(self._bundles, digest)
                await send_bundle(blobs, digest, bundle)
            if frame.HasField("admin_request"):
                task = asyncio.create_task(self._answer(frame.admin_request, replies))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)

    async def _answer(self, request: pb.AdminRequest, replies: asyncio.Queue[pb.AdminReply]) -> None:
        """What is begun is done, also when its stream ends meanwhile: whoever asked has been told that it may be."""
        replies.put_nowait(await admin_forwarding.answer(self.verbs, request))


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
        standing=DrainState.SERVING if not w.standing else codec.standing_from_pb(pb.Standing(state=w.standing)),
        work=work_from_pb(w.work),
        max_num_seqs=w.max_num_seqs,
        max_num_batched_tokens=w.max_num_batched_tokens,
        kv_tokens=w.kv_tokens,
        default_sampling=json.loads(w.default_sampling_json or "{}"),
        version=w.version,
        generation=w.generation,
    )
