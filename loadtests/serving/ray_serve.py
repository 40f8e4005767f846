"""A server to compare with Headrace: Ray Serve's own ingress in front of a vLLM deployment, on a separate Ray
cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.process.ports import free_port
from cluster.ray.local_cluster import LocalRay, LocalRaySettings, RayDidNotStart
from loadtests.children import Child, Children, DidNotStart

READY_S = 240.0
APPLICATION = "bench"
RAY, DRIVER = "ray system", "ray driver"


@dataclass(frozen=True, slots=True)
class RayServe:
    """A running application, with the address of the ingress in front of it."""

    address: str
    metadata: tuple[tuple[str, str], ...]
    roots: list[tuple[int, str]]


@asynccontextmanager
async def running(
    children: Children,
    name: str,
    folder: Path,
    engine: Mapping[str, object],
    environment: Mapping[str, str],
    *,
    direct_ingress: bool,
    gpus: int = 0,
    simulated: Sequence[str] = (),
) -> AsyncIterator[RayServe]:
    """Run Ray and the application until the context ends. `simulated`: options of ray_app that replace the real engine
    by simulated engines. Raises DidNotStart."""
    grpc_port, first = free_port(), free_port()
    variables = dict(environment)
    if direct_ingress:
        variables |= {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1"}
        for protocol, low in (("GRPC", first), ("HTTP", first + 50)):
            variables[f"RAY_SERVE_DIRECT_INGRESS_MIN_{protocol}_PORT"] = str(low)
            variables[f"RAY_SERVE_DIRECT_INGRESS_MAX_{protocol}_PORT"] = str(low + 49)
    home = Path(tempfile.mkdtemp(prefix="hr-"))
    local = LocalRay(LocalRaySettings(f"{name}-{uuid.uuid4().hex[:6]}", home))
    try:
        with _environment(variables):
            try:
                await asyncio.to_thread(local.start)
            except RayDidNotStart as error:
                raise DidNotStart(str(error)) from None
        ready = home / "app.ready"
        command = [sys.executable, "-m", "loadtests.serving.ray_app", "--folder", str(folder), "--ready", str(ready)]
        command += [
            "--engine",
            json.dumps(dict(engine)),
            "--gpus",
            str(gpus),
            "--grpc-port",
            str(grpc_port),
            "--http-port",
            str(free_port()),
            *simulated,
        ]
        engine_environment = {"LOADTEST_ENGINE_ENVIRONMENT": json.dumps(dict(environment))}
        app = children.start(name, DRIVER, command, {**variables, **local.environment(), **engine_environment})
        await _until_ready(app, ready)
        address = f"127.0.0.1:{first if direct_ingress else grpc_port}"
        await _until_open(app, address)
        assert local.pid is not None
        yield RayServe(address, (("application", APPLICATION),), [(local.pid, RAY), (app.pid, DRIVER)])
        await app.stop()
    finally:
        await asyncio.to_thread(local.stop)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(local.folder, ignore_errors=True)


async def _until_ready(app: Child, ready: Path) -> None:
    async def there() -> bool:
        return ready.exists()

    await app.until(there, "the application is deployed", READY_S)


async def _until_open(app: Child, address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:

        async def there() -> bool:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.channel_ready(), 1.0)
                return True
            return False

        await app.until(there, "its ingress takes connections", 30.0)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]):  # type: ignore[no-untyped-def]
    """Set environment variables of this process. Ray's processes inherit the variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
