"""Reports that a starting worker sends to the gateways: how many bytes of the model's weights it has fetched so far."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc

from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.policy.routing.gateway_subset import GatewaySubset
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.dial import Timing, open_channel
from cluster.worker.settings import ReplicaSettings
from cluster.worker.weights.fetch_progress import FetchProgress

FIRST_S = 0.5
"""Seconds from the start to the first report. A shorter start needs no report."""
REPORT_S = 1.0


@dataclass(frozen=True, slots=True)
class StartingReports:
    """The reports of one start of a worker. `run` sends them."""

    worker_id: str
    pod: str
    host: str
    gpu: str
    settings: ReplicaSettings
    progress: FetchProgress

    async def run(self) -> None:
        """Until cancelled, send reports to the gateways to which the worker will connect."""
        await asyncio.sleep(FIRST_S)
        settings = self.settings
        subset = GatewaySubset(self.worker_id, settings.max_gateways, settings.spec.min_replicas)
        await GatewayAddresses(settings.gateways, choose=subset.of).dial(self._report, Timing())

    async def _report(self, address: str) -> None:
        async with open_channel(address, self.settings.tls) as channel:
            call = pb_grpc.LinkStub(channel).Starting()
            try:
                while True:
                    await call.write(self._message())
                    await asyncio.sleep(REPORT_S)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # a write after the call's end: InvalidStateError
                if await call.code() is not grpc.StatusCode.UNIMPLEMENTED:
                    raise
                await asyncio.Event().wait()  # a gateway of an older release: nothing to report there
            finally:
                call.cancel()

    def _message(self) -> pb.StartingWorker:
        progress = self.progress
        return pb.StartingWorker(
            worker_id=self.worker_id,
            model=self.settings.spec.name,
            pod=self.pod,
            host=self.host,
            gpu=self.gpu,
            fetched_bytes=progress.fetched_bytes,
            total_bytes=progress.total_bytes,
            bytes_per_s=progress.bytes_per_s,
        )
