"""Tests of the endpoints of the console's live feed: which data each viewer gets, and how a stream ends."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2 as pb
from cluster.gateway.console.feed import FeedEndpoints
from cluster.gateway.console.overview.live import MAX_PENDING, MAX_SUBSCRIBERS, Subscriber
from cluster.wire.bundle import Bundle
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.console_feed import console_port, watching
from tests.support.keyed import bearer, eventually, keyed_cluster


async def test_a_stream_pings_and_ends_with_its_session(cluster: TestCluster) -> None:
    """A stream gets pings while there are no other events. It ends with the event `end` when its session is no longer
    valid."""
    is_valid = True
    feed = FeedEndpoints(cluster.gateway.live, ping_s=0.05, check_s=0.02)
    async with console_port(feed, is_valid=lambda: is_valid) as port, watching(port) as console:
        await until(lambda: "ping" in console.names, "the stream is pinged")
        is_valid = False
        await until(lambda: console.ended, "the stream has ended")
        assert console.names[-1] == "end"
        await until(lambda: not cluster.gateway.live._views, "nobody watches")


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_process_shows_few_consoles(cluster: TestCluster) -> None:
    """The 33rd console of a process gets status 503. It is accepted once another console has disconnected."""
    feed = FeedEndpoints(cluster.gateway.live)
    async with console_port(feed) as port, AsyncExitStack() as stack:
        first = AsyncExitStack()
        await first.enter_async_context(watching(port))
        for _ in range(MAX_SUBSCRIBERS - 1):
            await stack.enter_async_context(watching(port))
        async with watching(port) as refused:
            assert refused.status == 503
        await first.aclose()
        await until(lambda: len(cluster.gateway.live._views[""].subscribers) < MAX_SUBSCRIBERS, "one has left")
        async with watching(port) as console:
            assert console.status == 200


async def test_a_stopping_gateway_ends_its_streams(tmp_path: Path) -> None:
    """A stopping gateway does not wait for its consoles: each gets the event `end`."""
    async with running_cluster(tmp_path) as cluster, console_port(FeedEndpoints(cluster.gateway.live)) as port:
        async with watching(port) as console:
            cluster.gateway.service.close("stopping")
            await until(lambda: console.ended, "the stream has ended")
            assert console.names[-1] == "end"
        async with watching(port) as console:
            assert console.status == 503


def test_a_slow_reader_is_cut() -> None:
    """Up to a bounded number of events wait for a subscriber that does not read. One more event ends the subscriber's
    stream."""
    cut: list[bool] = []
    subscriber = Subscriber("")
    subscriber.on_cut = lambda: cut.append(True)
    for _ in range(MAX_PENDING):
        subscriber.push(b"delta", b"{}")
    assert cut == []
    subscriber.push(b"delta", b"{}")
    assert subscriber.is_cut
    assert cut == [True]


@pytest.mark.slow
async def test_a_viewer_that_reads_nothing_is_disconnected(cluster: TestCluster) -> None:
    """A client that opens the stream and does not read is disconnected. Other streams continue."""
    live = cluster.gateway.live
    async with console_port(FeedEndpoints(live)) as port, watching(port) as console:
        with socket.create_connection(("127.0.0.1", port)) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(b"GET / HTTP/1.0\r\nhost: test\r\n\r\n")
            await until(lambda: len(live._views[""].subscribers) == 2, "two watch")
            big = b'{"at": 1, "filling": "' + b"x" * (1 << 20) + b'"}'
            while len(live._views[""].subscribers) == 2:
                for subscriber in live._views[""].subscribers - live._views[""].new:
                    subscriber.push(b"other", big)
                await asyncio.sleep(0.01)
        assert not console.ended
        ticks = live.ticks
        await until(lambda: live.ticks > ticks, "the other goes on")


@pytest.mark.slow
async def test_roles_see_what_they_may(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """An operator sees all tenants, with workers and gateways. A tenant's administrator sees its own calls and sums,
    without names of workers, gateways and other tenants, both in GetOverview and in the stream."""
    async with keyed_cluster(tmp_path) as keyed:
        cluster = keyed.cluster
        worker = await cluster.add_worker(sim_engine(checkpoint), bundle, host="host-of-worker")
        keys = {name: await role_key(keyed.ledger, name, "caller") for name in ("acme", "rival")}
        boss = await role_key(keyed.ledger, "acme", "tenant_admin")
        operator = await role_key(keyed.ledger, "ops", "operator")
        address = cluster.gateway.endpoints["admin"]
        for key in (*keys.values(), boss, operator):
            async with AdminClient(address, key) as admin:
                await until_known(admin, "Fleet.GetOverview", pb.GetOverviewRequest())
        for key in keys.values():
            await cluster.stub.Chat(chat(), metadata=bearer(key))

        async def overview(key: str) -> tuple[bytes, Any]:
            async with AdminClient(address, key) as admin:
                answer = await admin.ask("Fleet.GetOverview", pb.GetOverviewRequest(with_calls=True))
            return answer.document, json.loads(answer.document)

        async def shows_both() -> bool:
            return {row["tenant"] for row in (await overview(operator))[1]["calls"]} == {"acme", "rival"}

        await eventually(shows_both, "both calls are shown")
        _, whole = await overview(operator)
        assert {row["id"] for row in whole["tenants"]} >= {"acme", "rival"}
        data, own = await overview(boss)
        async with console_port(FeedEndpoints(cluster.gateway.live), "acme") as port, watching(port) as console:
            seen = bytes(console.raw)
        for shown in (data, seen):
            for name in ("rival", worker.identity.worker_id, "host-of-worker", cluster.gateway.hub.gateway_id):
                assert name.encode() not in shown
        assert [row["id"] for row in own["tenants"]] == ["acme"]
        assert own["tenants"][0]["requests"] == 1
        assert [row["tenant"] for row in own["calls"]] == ["acme"]
        assert [row["id"] for row in own["models"]] == ["sim"]
        assert own["workers"] == own["gateways"] == own["scaling"] == []


@pytest.mark.parametrize(
    ("query", "tenant", "status", "words"),
    [
        ("series=none", "", 400, "series: has no 'none'; there are tokens"),
        ("series=tokens&seconds=4", "", 400, "seconds: must be a whole number from 5 to 3600"),
        ("series=tokens&seconds=1e3", "", 400, "seconds"),
        ("series=tokens&model=sim&tenant=acme", "", 400, "model: cannot be combined"),
        ("series=tokens&tenant=rival", "acme", 404, "does not exist"),
        ("series=tokens&model=sim", "acme", 400, "model: cannot be combined"),
        ("&".join(f"a{at}=1" for at in range(17)), "", 400, "at most 16"),
        ("series=tokens,tokens,ttft_p99&seconds=10", "acme", 200, ""),
        ("", "", 200, ""),
    ],
)
async def test_queries_of_the_history(cluster: TestCluster, query: str, tenant: str, status: int, words: str) -> None:
    """An invalid query gets an error that names the field and the remedy. A valid query returns null for steps that
    have no measurement."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"headers": [], "query_string": query.encode(), "path": "/", "method": "GET"}
    await FeedEndpoints(cluster.gateway.live).history(scope, None, send, tenant)  # type: ignore[arg-type]
    assert sent[0]["status"] == status
    answer = json.loads(sent[1]["body"])
    if status != 200:
        assert words in answer["error"]["message"]
        return
    steps = 720 if not query else 2
    assert answer["series"]["tokens"] == [None] * steps
    assert answer["from_s"] % 5 == 0
