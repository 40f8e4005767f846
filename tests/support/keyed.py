"""A gateway that requires API keys, with a ledger of its own, and requests with keys over gRPC and HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.gateway.auth.tenants import TenantAuthenticator
from cluster.gateway.server import Gateway
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from cluster.v1 import inference_pb2 as pb
from cluster.wire.dial import Timing, read
from tests.support.cluster import LOOPBACK, PATIENT, TestCluster, running_cluster
from tests.support.http import Reply, Wire
from tests.support.shell import headrace

SECRET, PEPPER = "s" * 32, "p" * 32


def keyed_text(folder: Path, more: str = "", gateway: str = "") -> str:
    """Return the text of a configuration with API keys. Its secrets and its ledger are files in `folder`.

    `more`: further sections; `gateway`: further lines of the section gateway.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(SECRET + "\n")
    (folder / "pepper").write_text(PEPPER + "\n")
    text = LOOPBACK.replace("gateway:\n", f"gateway:\n{gateway}")
    if "auth:" not in more:
        more += f"auth: {{cluster_secret_file: {folder / 'secret'}, api_keys: {{pepper_file: {folder / 'pepper'}}}}}\n"
    if "store:" not in more:
        more += f"store: {{database_url: 'sqlite:///{folder / 'ledger.db'}'}}\n"
    return text + more


class Keyed:
    """A cluster whose callers need API keys."""

    def __init__(self, cluster: TestCluster, file: Path) -> None:
        self.cluster = cluster
        self.file = file
        self.ledger = Ledger(f"sqlite:///{file.parent / 'ledger.db'}", peppers=(PEPPER.encode(),))
        """The same database as the gateway's, opened as the command line opens it."""

    @property
    def gateway(self) -> Gateway:
        """Gateway of the cluster."""
        return self.cluster.gateway

    @property
    def door(self) -> TenantAuthenticator:
        """Authenticator of the gateway."""
        assert self.gateway.tenants is not None
        return self.gateway.tenants

    async def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the configuration of the cluster, as an operator does."""
        return await asyncio.to_thread(headrace, *arguments, "-f", str(self.file))

    async def suspend(self, tenant: str, suspended: bool = True) -> None:
        """Suspend or resume a tenant, as `tenants suspend` and `tenants resume` do."""
        await asyncio.to_thread(self.ledger.tenants.suspend, tenant, suspended)
        self.door.refresh()

    async def key(self, tenant: str, **fields: Any) -> str:
        """Create a tenant and return a key of the tenant, once the gateway accepts the key.

        `fields`: fields of the tenant's policy.
        """
        await asyncio.to_thread(self.ledger.tenants.create, TenantPolicy.from_json({"name": tenant, **fields}))
        key = await self.another_key(tenant)
        await self.until_known(tenant, key)
        return key

    async def another_key(self, tenant: str) -> str:
        """Create and return another key of a tenant. The gateway accepts the key a moment later."""
        return (await asyncio.to_thread(self.ledger.keys.create, tenant, "")).secret

    async def until_known(self, tenant: str, key: str) -> None:
        """Wait until the gateway accepts a key and knows the tenant's current policy."""
        wanted = (await asyncio.to_thread(self.ledger.tenants.get, tenant)).policy
        self.door.refresh()
        await eventually(lambda: self._knows(wanted, key), f"{tenant} is known")

    async def _knows(self, wanted: TenantPolicy, key: str) -> bool:
        stub = self.cluster.stub
        try:
            await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
        except grpc.aio.AioRpcError:
            return False
        entry = self.door.snapshot().tenants.get(wanted.name)
        return entry is not None and entry.policy == wanted

    async def fetch(self, path: str, body: Any = None, *, key: str = "", **options: Any) -> Reply:
        """Send one HTTP request on a new connection and return the response."""
        named = {"authorization": f"Bearer {key}"} if key else {}
        return await fetch_raw(self.cluster, path, body, **named, **options)


async def eventually(holds: Callable[[], Awaitable[Any]], what: str, timeout_s: float = 60.0) -> None:
    """Repeat `holds` until it returns a true value. Raises AssertionError with `what` on timeout."""
    deadline = time.monotonic() + timeout_s
    while not await holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out waiting until {what}")
        await asyncio.sleep(0.02)


async def fetch_raw(cluster: TestCluster, path: str, body: Any, **options: Any) -> Reply:
    """Send a request with any headers on a new connection and return the response."""
    wire = await Wire.open(cluster)
    try:
        wire.ask(path, body, **options)
        return await wire.reply()
    finally:
        await wire.close()


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata with a key."""
    return (("authorization", f"Bearer {key}"),)


@asynccontextmanager
async def keyed_cluster(
    folder: Path, more: str = "", gateway: str = "", timing: Timing = PATIENT
) -> AsyncIterator[Keyed]:
    """Run a gateway that requires keys and has no workers."""
    text = keyed_text(folder, more, gateway)
    file = folder / "cluster.yaml"
    file.write_text(text)
    async with running_cluster(folder / "gateway", text, timing) as cluster:
        keyed = Keyed(cluster, file)
        try:
            yield keyed
        finally:
            keyed.ledger.close()


async def session_end(stream: Any, call_id: int) -> str:
    """Read a session until one of its calls has ended. Return the reason of the end; empty for a normal end."""
    while True:
        message = await asyncio.wait_for(read(stream), 60)
        assert message is not None, "the session ended early"
        for event in message.events:
            if event.call_id != call_id:
                continue
            if event.status:
                return reason_of(event.status)
            if event.HasField("chat") and event.chat.HasField("usage"):
                return ""


def reason_of(raw: bytes) -> str:
    """Return the reason of the ErrorInfo in a serialized google.rpc.Status; empty if there is no ErrorInfo."""
    for part in status_pb2.Status.FromString(raw).details:
        info = error_details_pb2.ErrorInfo()
        if part.Unpack(info):
            return str(info.reason)
    return ""
