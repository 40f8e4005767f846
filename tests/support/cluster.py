"""A cluster in one process for tests: a real gateway on loopback, real links, and any engine behind the links."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from cluster.api.demand import EngineCounts
from cluster.api.ports import AdapterEngine, Engine, EngineDead
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.config.document import parse
from cluster.config.schema import Config
from cluster.gateway.server import Gateway
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from cluster.wire.tls import TlsFiles
from cluster.worker.adapters.port import AdapterFiles
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.parsing.model_parser import with_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.parsing.port import OutputParsers
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from cluster.worker.session import WorkerSession
from cluster.worker.weights.tokenizer_bundle import build_bundle

_numbers = itertools.count(1)

LOOPBACK = """
api_version: headrace/v1
name: test
gateway:
  listen:
    {grpc: "127.0.0.1:0", http: "127.0.0.1:0", link: "127.0.0.1:0", admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}
  drain_timeout_s: 0
models:
  - {name: sim, source: "sim:///nowhere"}
"""

PATIENT = Timing(silence_s=60.0, hang_s=60.0)
"""Intervals of the tests' links. A test whose gateway must find a failed worker passes its own, such as Timing(): by
these default intervals a busy machine loses links now and then, since gateway and workers share one process."""


async def until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait until `holds` returns true. Raises AssertionError with the text `what` on timeout."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out waiting until {what}")
        await asyncio.sleep(0.005)


@dataclass
class Worker:
    """A worker in this process."""

    identity: WorkerIdentity
    engine: Engine
    info: EngineInfo
    end: WorkerSession
    task: asyncio.Task[None]

    async def stop(self) -> None:
        """Close the worker's links, as an orderly shutdown does."""
        await self.end.close()
        await asyncio.gather(self.task, return_exceptions=True)


class TestCluster:
    """A gateway and the workers that a test has added."""

    __test__ = False

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.workers: list[Worker] = []
        self.channel = grpc.aio.insecure_channel(gateway.endpoints["grpc"])
        self.stub = pb_grpc.InferenceStub(self.channel)

    async def add_worker(
        self,
        engine: Engine,
        bundle: Bundle,
        *,
        model: str = "sim",
        tls: TlsFiles | None = None,
        timing: Timing = PATIENT,
        wait: bool = True,
        info: EngineInfo | None = None,
        gateways: Sequence[str] = (),
        node: str = "",
        version: str = "",
        generation: str = "",
        weight_digest: str = "",
        pod: str = "",
        host: str = "",
        gpu: str = "",
        parser: OutputParsers | None = None,
        renderer: PromptRenderer | None = None,
        adapter_files: AdapterFiles | None = None,
    ) -> Worker:
        """Start an engine and link it to the gateway as a worker.

        `info`: the engine's info, if the engine is already started. `adapter_files`: for an engine that is also
        an AdapterEngine.
        """
        number = next(_numbers)
        if info is None:
            info = await engine.start()
        info = with_parsers(info, parser if isinstance(parser, OutputParser) else None, renderer)
        identity = WorkerIdentity(
            worker_id=f"{model}-w{number}",
            incarnation=f"i{number}",
            model=model,
            bundle_digest=bundle.digest,
            node=node,
            version=version,
            generation=generation,
            weight_digest=weight_digest,
            pod=pod,
            host=host,
            gpu=gpu,
        )
        end = WorkerSession(
            identity=identity,
            engine=engine,
            info=info,
            bundle=bundle,
            gateways=gateways or [self.gateway.endpoints["link"]],
            tls=tls,
            timing=timing,
            parser=parser,
            adapter_engine=cast(AdapterEngine, engine) if adapter_files is not None else None,
            adapter_files=adapter_files,
            kv_events=engine if isinstance(engine, SimEngine) else None,
            renderer=renderer,
            engine_counts=engine.counts if isinstance(engine, SimEngine) else EngineCounts,
        )
        worker = Worker(identity, engine, info, end, asyncio.create_task(_run(end)))
        self.workers.append(worker)
        if wait:
            await until(lambda: self.linked(identity.worker_id), f"{identity.worker_id} is linked with room")
        return worker

    def linked(self, worker_id: str) -> bool:
        """Return whether a worker's link is up and the worker has granted credit (free capacity)."""
        return any(link.identity.worker_id == worker_id and link.free.sequences > 0 for link in self.gateway.hub.links)

    @property
    def remaining(self) -> list[str]:
        """What remains of calls in the gateway, the links and the engines; empty if nothing does."""
        gateway, workers = self.gateway, [w for w in self.workers if not w.task.done()]
        models = [model.name for model in gateway.directory.models]
        found: dict[str, object] = {
            "calls": gateway.service.statistics(),
            "running on links": gateway.hub.statistics().running,
            "running at workers": sum(w.end.statistics().running for w in workers),
            "running in engines": sum(w.engine.load().running for w in workers),
            "waiting": [n for n in models if gateway.scheduler.queues.waiting(n) != (0, 0)],
            "waiting to be rendered": [n for n in models if gateway.scheduler.renders.waiting(n) != (0, 0)],
        }
        return [f"{what}: {value}" for what, value in found.items() if value]

    @property
    def idle(self) -> bool:
        """Whether no call remains."""
        return not self.remaining

    async def until_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until no call remains. Raises AssertionError with what remains on timeout."""
        deadline = time.monotonic() + timeout_s
        while remaining := self.remaining:
            assert time.monotonic() < deadline, f"after {timeout_s:.0f} s there remain: {'; '.join(remaining)}"
            await asyncio.sleep(0.005)


async def _run(end: WorkerSession) -> None:
    try:
        await end.run()
    except EngineDead:
        return


@asynccontextmanager
async def running_cluster(folder: Path, text: str = LOOPBACK, timing: Timing = PATIENT) -> AsyncIterator[TestCluster]:
    """Run a gateway without workers. Workers that are added are stopped at the end."""
    config: Config = parse(text)
    gateway = Gateway(config, folder, timing)
    await gateway.start()
    cluster = TestCluster(gateway)
    try:
        yield cluster
    finally:
        await cluster.channel.close()
        for worker in cluster.workers:
            await worker.stop()
        await gateway.stop(0)


def sim_engine(folder: Path, **parameters: object) -> SimEngine:
    """Return a simulated engine that uses the tokenizer in a checkpoint folder."""
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    return SimEngine(SimConfig.from_source(f"sim://{folder}?{query}"))


def bundle_of(folder: Path) -> Bundle:
    """Return the tokenizer bundle of a checkpoint folder."""
    return build_bundle(folder)
