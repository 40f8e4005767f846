"""Several gateway processes on one port: each of them answers the console, even one without an admin port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cluster.config.document import parse
from cluster.gateway.server import Gateway
from cluster.http2 import listening_socket
from cluster.process.ports import free_ports
from cluster.wire.bundle import Bundle
from tests.support.cluster import LOOPBACK, PATIENT, TestCluster, sim_engine
from tests.support.console import Browser


@pytest.fixture
async def second(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Start the second of two gateway processes without the first. It is then the only process on the shared port."""
    text = LOOPBACK.replace("  drain_timeout_s: 0", "  drain_timeout_s: 0\n  processes: 2")
    for name, port in zip(("grpc", "http", "link"), free_ports(3), strict=True):
        text = text.replace(f'{name}: "127.0.0.1:0"', f'{name}: "127.0.0.1:{port}"')
    async with AsyncExitStack() as stack:
        gateway = Gateway(parse(text), tmp_path, PATIENT, process=1)
        await gateway.start(listening_socket("127.0.0.1", 0))
        stack.push_async_callback(gateway.stop, 0)
        cluster = TestCluster(gateway)
        stack.push_async_callback(cluster.channel.close)
        yield cluster
        for worker in cluster.workers:
            await worker.stop()


async def test_the_second_process_has_the_admin_methods(second: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A process without an admin port answers the console's admin requests itself."""
    assert "admin" not in second.gateway.endpoints
    worker = await second.add_worker(sim_engine(checkpoint), bundle)
    browser = Browser(second)
    assert (await browser.session())["role"] == "operator"
    listed = (await browser.admin("Fleet.ListWorkers")).json["workers"]
    assert [entry["worker_id"] for entry in listed] == [worker.identity.worker_id]
    drained = await browser.admin("Fleet.Drain", target=worker.identity.worker_id, timeout_s=5)
    assert drained.json["workers"][0]["worker_id"] == worker.identity.worker_id
    reply = await browser.admin("Catalog.Freeze", name="sim")
    assert (reply.status, reply.json["error"]["code"]) == (503, "UNAVAILABLE")  # forwarded, and there is no controller
    assert "controller" in reply.json["error"]["message"]
