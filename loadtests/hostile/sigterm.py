"""Deletion of a worker pod: SIGTERM to `ray start --block` of the node on which 20 streams run.

The scenario runs a real Ray with a head and two nodes, Serve, a gateway in a separate process, and a simulated engine
as replica. Half of the streams end by themselves in the first half of drain_timeout_s. The other streams last longer
than drain_timeout_s and must resume on the replacement. A stream is broken if it fails, or if its text differs from the
text of an undisturbed call.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import yaml

from cluster.api.types import ModelSpec
from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.process.ports import free_port
from cluster.ray.backend import ChildBackend
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.worker.settings import ReplicaSettings
from loadtests.children import ROOT, Children
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from tests.support.checkpoints import build_checkpoint
from tests.support.ray_nodes import RayNodes, ray_nodes

STREAMS = 20
DRAIN_S = 12.0
DECODE_MS = 20
SHORT, LONG = 150, 1000
"""Numbers of tokens of a short stream (three seconds) and of a long stream (twenty seconds)."""
BROKEN = "streams broken by SIGTERM to `ray start --block` with 20 running streams"
ROWS: Mapping[str, Bound] = {BROKEN: Bound("<=", 0.0)}
START_S, CALL_S = 60.0, 90.0
MODEL = "sim"


@dataclass
class Stream:
    """Record of one call from the caller's side."""

    text: str = ""
    error: str = ""
    resumed: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)


def request_of(number: int) -> pb.ChatRequest:
    """Return a request with a different text for each number. Short and long requests alternate."""
    message = pb.Message(role="user", content=f"Tell story {number}")
    tokens = LONG if number % 2 else SHORT
    return pb.ChatRequest(model=MODEL, messages=[message], max_tokens=tokens, temperature=0.0, ignore_eos=True)


async def follow(stub: Any, number: int, stream: Stream) -> Stream:
    """Read a stream to the end or to an error, and return the stream."""
    try:
        async for chunk in stub.StreamChat(request_of(number), timeout=CALL_S):
            stream.begun.set()
            stream.text += "".join(choice.delta.content for choice in chunk.choices)
            stream.resumed = max(stream.resumed, chunk.usage.resumed)
    except grpc.aio.AioRpcError as error:
        stream.error = f"{error.code().name}: {error.details()}"
        stream.begun.set()
    return stream


async def call_all(stub: Any) -> list[Stream]:
    """Make every call undisturbed and return the streams."""
    return await asyncio.gather(*(follow(stub, number, Stream()) for number in range(STREAMS)))


@contextlib.asynccontextmanager
async def gateway(children: Children, folder: Path) -> AsyncIterator[tuple[str, str]]:
    """Run a gateway on loopback and yield the addresses of its gRPC and link ports."""
    listen = {name: f"127.0.0.1:{free_port()}" for name in ("grpc", "http", "link", "admin", "metrics")}
    folder.mkdir(parents=True)
    file = folder / "cluster.yaml"
    settings = {"listen": listen, "drain_timeout_s": 1}
    file.write_text(yaml.safe_dump({"api_version": "headrace/v1", "name": "sigterm", "gateway": settings}))
    command = [sys.executable, "-m", "cluster.cli.main", "gateway", "-f", str(file), "--folder", str(folder / "g")]
    child = children.start("gateway", "gateway", command, {"PYTHONPATH": str(ROOT)})
    async with grpc.aio.insecure_channel(listen["grpc"]) as channel:

        async def open_() -> bool:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.channel_ready(), 1.0)
                return True
            return False

        await child.until(open_, "its gRPC port takes connections", START_S)
    yield listen["grpc"], listen["link"]
    await child.stop()


@contextlib.asynccontextmanager
async def one_replica(ray: RayNodes, checkpoint: Path, link: str) -> AsyncIterator[ChildBackend]:
    """Run a controller that keeps one replica of the model running."""
    spec = ModelSpec(MODEL, f"sim://{checkpoint}?decode_ms={DECODE_MS}&max_num_seqs=64")
    backend = ChildBackend("sigterm", ray.head.address, ray.head.environment(), ray.folder / "driver.log")
    end = ControllerLinks(controller_id="sigterm", gateways=[link], tls=None, bundles=lambda _: None)
    controller = Controller(backend, end)
    controller.models.want([ReplicaSettings(spec, "sigterm", gateways=(link,), drain_timeout_s=DRAIN_S)])
    parts = [asyncio.create_task(end.run()), asyncio.create_task(controller.run())]
    try:
        yield backend
    finally:
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        await backend.close()


async def until_answered(stub: Any) -> None:
    """Wait until a call is answered. Raises RuntimeError with the last error of a call."""
    until = time.monotonic() + START_S
    while (tried := await follow(stub, 0, Stream())).error:
        if time.monotonic() > until:
            raise RuntimeError(f"no replica serves: {tried.error}")
        await asyncio.sleep(0.2)


async def until_nodes(backend: ChildBackend, count: int) -> None:
    """Wait until Ray has `count` nodes. Raises TimeoutError."""
    async with asyncio.timeout(START_S):
        while len((await backend.observe()).nodes) < count:  # noqa: ASYNC110 - another process's Ray
            await asyncio.sleep(0.2)


def broken_streams(disturbed: Sequence[Stream], undisturbed: Sequence[Stream]) -> list[str]:
    """Return the reason for each broken stream. Raises RuntimeError if an undisturbed call failed."""
    if lost := [stream.error for stream in undisturbed if stream.error]:
        raise RuntimeError(f"an undisturbed call failed: {lost[0]}")
    pairs = zip(disturbed, undisturbed, strict=True)
    return [stream.error or "another text" for stream, whole in pairs if stream.error or stream.text != whole.text]


async def measure(stage: Stage) -> list[Figure]:
    """Make the calls undisturbed, then again with SIGTERM while the streams run; return the report's rows."""
    from loadtests.scenarios.parts import exact

    checkpoint = build_checkpoint("llama", stage.folder / "sigterm-llama")
    with ray_nodes(DRAIN_S) as ray:
        ray.add("first")
        async with (
            gateway(stage.children, stage.folder / "sigterm") as (address, link),
            one_replica(ray, checkpoint, link) as backend,
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub = pb_grpc.InferenceStub(channel)
            await until_answered(stub)
            ray.add("second")
            await until_nodes(backend, 3)
            streams = [Stream() for _ in range(STREAMS)]
            running = [asyncio.create_task(follow(stub, number, stream)) for number, stream in enumerate(streams)]
            await asyncio.gather(*(stream.begun.wait() for stream in streams))
            process, began = ray.terminate("first"), time.monotonic()
            await asyncio.gather(*running)
            await asyncio.to_thread(process.wait, 60)
            took_s = time.monotonic() - began
            reasons = broken_streams(streams, await call_all(stub))
    moved = sum(bool(stream.resumed) for stream in streams)
    stage.screen.say(f"{moved} of {STREAMS} streams were resumed; the node ended {took_s:.1f} s after SIGTERM")
    if not reasons and not 0 < moved < STREAMS:
        raise RuntimeError(f"{moved} streams were resumed, but some and not all should be: the run proves nothing")
    note = f"{STREAMS - moved} ended on their replica, {moved} were resumed; drain_timeout_s {DRAIN_S:g}"
    return [exact(BROKEN, len(reasons), ROWS[BROKEN], "streams", "; ".join(reasons[:3]) or note)]
