"""Several gateway processes, and several gateways, that show one cluster in their consoles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.local.ports import choose_ports
from cluster.config.document import parse
from cluster.gateway.console.feed import FeedEndpoints
from cluster.gateway.console.peers.peers import FirstConnected, PartAssembler, pieces_of
from cluster.gateway.console.peers.valkey_peers import ValkeyPeers
from cluster.gateway.server import Gateway
from cluster.wire.bundle import Bundle
from tests.support.calls import chat
from tests.support.cluster import LOOPBACK, TestCluster, sim_engine, until
from tests.support.console_feed import console_port, watching
from tests.support.valkey import Server


@asynccontextmanager
async def processes_of_a_host(folder: Path) -> AsyncIterator[list[TestCluster]]:
    """Run the two gateway processes of a host. For the test, both are gateways in this process."""
    config = choose_ports(parse(LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  processes: 2")))
    async with AsyncExitStack() as stack:
        yield [await _started(stack, Gateway(config, folder / str(number), process=number)) for number in range(2)]


@asynccontextmanager
async def gateways_with_a_store(folder: Path, count: int = 2) -> AsyncIterator[tuple[list[TestCluster], Server]]:
    """Run gateways that share a store."""
    store = Server(folder)
    await store.start()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(store.stop)
        config = parse(LOOPBACK + f"store: {{limits_url: '{store.url}'}}\n")
        clusters = [await _started(stack, Gateway(config, folder / f"gateway{at}")) for at in range(count)]
        for cluster in clusters:
            async with asyncio.timeout(60):
                await _peers(cluster).connected.wait()
        yield clusters, store


async def _started(stack: AsyncExitStack, gateway: Gateway) -> TestCluster:
    await gateway.start()
    stack.push_async_callback(gateway.stop, 0)
    cluster = TestCluster(gateway)
    stack.push_async_callback(cluster.channel.close)

    async def stop_workers() -> None:
        for worker in cluster.workers:
            await worker.stop()

    stack.push_async_callback(stop_workers)
    return cluster


def _peers(cluster: TestCluster) -> ValkeyPeers:
    peers = cluster.gateway.live.peers
    assert isinstance(peers, FirstConnected)
    assert isinstance(peers._of_all, ValkeyPeers)
    return peers._of_all


async def history_of(cluster: TestCluster, query: str) -> Any:
    """Return the history that a gateway shows."""
    answer: dict[str, Any] = {}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            answer.update(json.loads(message["body"]))

    scope = {"headers": [], "query_string": query.encode(), "path": "/", "method": "GET"}
    await FeedEndpoints(cluster.gateway.live).history(scope, None, send, "")  # type: ignore[arg-type]
    return answer


async def one_cluster_is_shown(
    clusters: list[TestCluster], checkpoint: Path, bundle: Bundle, links_of_second: int = 1
) -> None:
    """Assert that each of two gateways shows the workers, calls and tenants of both gateways. `links_of_second`: number
    of links of the worker that was given only the second gateway's address."""
    links = [cluster.gateway.endpoints["link"] for cluster in clusters]
    both = await clusters[0].add_worker(sim_engine(checkpoint, decode_ms=1), bundle, gateways=links)
    only = await clusters[1].add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    await until(lambda: clusters[1].linked(both.identity.worker_id), "the worker is linked to both gateways")
    await clusters[0].stub.Chat(chat())  # before anybody watches
    wanted = {both.identity.worker_id: 2, only.identity.worker_id: links_of_second}
    ids = {cluster.gateway.hub.gateway_id for cluster in clusters}
    await _shows_all(clusters[0], clusters[1], ids, wanted)
    await _shows_all(clusters[1], clusters[0], ids, wanted)


async def _shows_all(shown: TestCluster, other: TestCluster, ids: set[str], links: dict[str, int]) -> None:
    """Assert that the console of gateway `shown` shows both gateways, all workers, and the calls of gateway `other`.
    `ids`: the ids of the gateways. `links`: number of links of each worker, by worker id."""
    async with console_port(FeedEndpoints(shown.gateway.live)) as port, watching(port) as console:
        await until(lambda: {row["id"] for row in console.document["gateways"]} == ids, "both gateways are shown")
        before = len(console.document["calls"])
        await other.stub.Chat(chat())
        await until(lambda: len(console.document["calls"]) == before + 1, "the other gateway's call is shown")
        await until(
            lambda: {row["id"]: len(row["links"]) for row in console.document["workers"]} == links,
            "the workers of both are shown once",
        )
        await until(lambda: console.document["tenants"][0]["requests"] == before + 1, "its requests are added")
        assert [row["id"] for row in console.document["tenants"]] == ["default"]
        assert [row["id"] for row in console.document["models"]] == ["sim"]


@pytest.mark.slow
async def test_processes_of_a_host_show_one_cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Two processes of one host, without a store, show each other's workers, calls and sums."""
    async with processes_of_a_host(tmp_path) as clusters:
        await one_cluster_is_shown(clusters, checkpoint, bundle, links_of_second=2)


@pytest.mark.slow
@pytest.mark.thorough
async def test_gateways_with_a_store_show_one_cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Two gateways that share a store show each other's workers, calls and sums. If the store fails, each gateway still
    shows its own data and reports the failure in the list of gateways."""
    async with gateways_with_a_store(tmp_path) as (clusters, store):
        await one_cluster_is_shown(clusters, checkpoint, bundle)
        async with console_port(FeedEndpoints(clusters[0].gateway.live)) as port, watching(port) as console:
            await until(lambda: len(console.document["gateways"]) == 2, "both are shown")
            await store.stop()
            await until(lambda: len(console.document["gateways"]) == 1, "only the own gateway is shown")
            await store.start()
            await until(lambda: len(console.document["gateways"]) == 2, "both are shown again")


async def test_nothing_is_made_while_nobody_watches(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway without an open console makes no overview document. It still answers other gateways that ask for its
    data."""
    async with gateways_with_a_store(tmp_path) as (clusters, _):
        first, second = (cluster.gateway.live for cluster in clusters)
        assert (first.ticks, second.ticks) == (0, 0)
        async with console_port(FeedEndpoints(first)) as port, watching(port) as console:
            await until(lambda: len(console.document["gateways"]) == 2, "both are shown")
            await until(lambda: first.ticks >= 2, "the document is made anew")
        assert second.ticks == 0
        ticks = first.ticks
        await until(lambda: not first._views, "the console is gone")
        await clusters[0].add_worker(sim_engine(checkpoint), bundle)
        assert first.ticks <= ticks + 1


@pytest.mark.slow
@pytest.mark.parametrize("with_store", [False, True])
async def test_the_history_of_all_is_added(tmp_path: Path, checkpoint: Path, bundle: Bundle, with_store: bool) -> None:
    """Any process that gets a query for the history adds the values of the other processes to its own."""
    async with AsyncExitStack() as stack:
        if with_store:
            clusters, _ = await stack.enter_async_context(gateways_with_a_store(tmp_path))
        else:
            clusters = await stack.enter_async_context(processes_of_a_host(tmp_path))
        for cluster in clusters:
            await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
            await cluster.stub.Chat(chat())
        lives = [cluster.gateway.live for cluster in clusters]
        await until(lambda: all(live.history is not None for live in lives), "a step of the history is kept")

        async def tokens(at: int) -> list[float]:
            answer = await history_of(clusters[at], "series=tokens,streams&model=sim&seconds=600")
            assert answer["step_s"] == 5
            return [value for value in answer["series"]["tokens"] if value is not None]

        first, second = await asyncio.gather(tokens(0), tokens(1))
        assert first == second
        assert first != []


def test_a_large_part_travels_in_pieces() -> None:
    """A part of the overview with many rows is assembled from its pieces. Pieces of an unfinished part are dropped."""
    lists = {"workers": 1000, "models": 3, "tenants": 500, "calls": 2000}
    part = {"format": 1, "at": 1.0, **{name: [{"id": at} for at in range(count)] for name, count in lists.items()}}
    assembler, pieces = PartAssembler(), pieces_of(part)
    assert assembler.add("g", 1, pieces[0]) is None
    assert assembler.add("g", 1, pieces[1]) is None
    found = [assembler.add("g", 2, piece) for piece in pieces]
    assert found[:-1] == [None] * (len(pieces) - 1)
    assert found[-1] == part
    assert assembler.add("g", 1, pieces[2]) is None
    small: dict[str, Any] = {"format": 1, **{name: [] for name in lists}}
    assert [assembler.add("g", 3, piece) for piece in pieces_of(small)] == [small]
