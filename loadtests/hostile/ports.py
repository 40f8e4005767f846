"""A separate gateway for attacks on the gRPC port, and measurements of its CPU time, memory and answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import psutil

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.children import Child
from loadtests.scenarios.common import Stage
from loadtests.serving import ours, tenants
from tests.support.certificates import Authority

MAX_MESSAGE_BYTES: Final = 16 << 20
SAMPLE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Attacked:
    """A gateway without a worker. `keys`: API keys of two tenants, the attacker and a quiet tenant."""

    gateway: Child
    endpoints: Mapping[str, str]
    keys: Mapping[str, str]
    ca_file: Path | None = None
    """Certificate of the gateway's CA, if the gateway uses TLS."""

    def channel(self) -> grpc.aio.Channel:
        """Return a channel to the gRPC port."""
        if self.ca_file is None:
            return grpc.aio.insecure_channel(self.address)
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(self.ca_file.read_bytes()))

    @property
    def address(self) -> str:
        """Address of the gRPC port, as `host:port`."""
        return self.endpoints["grpc"]

    @property
    def process(self) -> psutil.Process:
        """The gateway's own process, without the guard process."""
        return self.gateway.commands()[0]

    def cpu_s(self) -> float:
        """Return the CPU time that the gateway has used so far, in seconds."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        """Return the resident memory of the gateway in bytes."""
        return int(self.process.memory_info().rss)


ATTACKER, QUIET = "attacker", "quiet"


async def attacked(stage: Stage, name: str, *, tls: bool = False) -> Attacked:
    """Start the gateway. Raises DidNotStart if the gateway is not ready in time."""
    more: dict[str, object] = {"max_message_bytes": MAX_MESSAGE_BYTES}
    files = Authority(stage.folder / f"{name}-tls").issue("gateway") if tls else None
    if files is not None:
        more["tls"] = {"cert_file": str(files.cert_file), "key_file": str(files.key_file)}
    home = stage.folder / f"{name}-tenants"
    keys = await tenants.make_keys(home, ("standard", "batch"))
    text = ours.configuration(ours.MODEL, home, more=more)
    child = ours.exec_gateway(stage.children, stage.folder, name, text)
    ready = stage.folder / name / ours.READY_FILE

    async def there() -> bool:
        return ready.exists()

    await child.until(there, "it serves", ours.READY_S)
    endpoints = json.loads(ready.read_text())["endpoints"]
    keys = {ATTACKER: keys["batch"], QUIET: keys["standard"]}
    return Attacked(child, endpoints, keys, None if files is None else files.ca_file)


@dataclass(slots=True)
class QuietCalls:
    """Calls of a quiet tenant, made one after the other."""

    waits_s: list[float] = field(default_factory=list)

    @property
    def longest_ms(self) -> float:
        """The longest wait for an answer, in milliseconds."""
        return 1000 * max(self.waits_s)


@asynccontextmanager
async def quiet_calls(gateway: Attacked) -> AsyncIterator[QuietCalls]:
    """Every few milliseconds, make a call of a tenant that takes no part in the attack, and record how long the call
    takes. This goes on while the context is open."""
    quiet = QuietCalls()
    async with gateway.channel() as channel:
        list_models: Any = pb_grpc.InferenceStub(channel).ListModels
        metadata = ours.authorization(gateway.keys[QUIET])
        await list_models(pb.ListModelsRequest(), metadata=metadata, timeout=30)

        async def call() -> None:
            while True:
                begin = time.perf_counter()
                await list_models(pb.ListModelsRequest(), metadata=metadata, timeout=30)
                quiet.waits_s.append(time.perf_counter() - begin)
                await asyncio.sleep(0.005)

        calling = asyncio.create_task(call())
        try:
            yield quiet
            await asyncio.sleep(0.05)
        finally:
            calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)


@dataclass(slots=True)
class Peak:
    """Peak memory of the gateway above the memory before an attack."""

    before: int
    most: int

    @property
    def mib(self) -> float:
        """Growth of the memory in MiB."""
        return (self.most - self.before) / (1 << 20)


@asynccontextmanager
async def peak_memory(gateway: Attacked) -> AsyncIterator[Peak]:
    """Sample the gateway's memory while the context is entered."""
    before = gateway.resident_bytes()
    peak = Peak(before, before)

    async def watch() -> None:
        while True:
            peak.most = max(peak.most, gateway.resident_bytes())
            await asyncio.sleep(SAMPLE_S)

    watching = asyncio.create_task(watch())
    try:
        yield peak
        await asyncio.sleep(2 * SAMPLE_S)
    finally:
        watching.cancel()
