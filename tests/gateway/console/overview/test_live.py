"""The live overview of a real gateway with simulated workers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from cluster.admin.v1 import admin_pb2 as pb
from cluster.gateway.console.feed import FeedEndpoints
from cluster.wire.bundle import Bundle
from tests.support.admin import AdminClient
from tests.support.calls import chat
from tests.support.cluster import TestCluster, sim_engine, until
from tests.support.console_feed import console_port, watching


async def read_all(call: object) -> list[object]:
    """Return the chunks of a streamed answer."""
    return [chunk async for chunk in call]  # type: ignore[attr-defined]


@pytest.mark.slow
async def test_a_killed_worker_is_shown_lost_and_its_calls_go_on_elsewhere(
    watchful: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """The row of a killed worker becomes LOST, with the number of its sequences that another worker continues. The row
    of the call shows the other worker. If the killed worker reconnects under the same id, the row shows it again."""
    cluster = watchful
    first = await cluster.add_worker(sim_engine(checkpoint, decode_ms=20), bundle)
    name = first.identity.worker_id
    async with console_port(FeedEndpoints(cluster.gateway.live)) as port, watching(port) as console:
        assert console.row("workers", name)["state"] == "READY"  # type: ignore[index]
        request = chat(max_tokens=400, ignore_eos=True)
        stream = asyncio.create_task(read_all(cluster.stub.StreamChat(request)))
        await until(lambda: any(row["worker"] == name and row["tokens"] for row in console.document["calls"]), "runs")
        first.task.cancel()
        await until(lambda: (console.row("workers", name) or {}).get("state") == "LOST", "the worker is shown lost")
        await until(lambda: console.document["calls"][0]["state"] == "resuming", "the call is shown to resume")
        assert console.document["calls"][0]["worker"] is None
        second = await cluster.add_worker(sim_engine(checkpoint, decode_ms=10), bundle)
        other = second.identity.worker_id
        await until(lambda: console.row("workers", name)["resumed"] == 1, "it is shown resumed")  # type: ignore[index]
        (call,) = console.document["calls"]
        await until(lambda: console.document["calls"][0]["worker"] == other, "the call shows its new worker")
        await stream
        await until(lambda: console.row("calls", call["id"])["state"] == "ended", "the end is shown")  # type: ignore[index]
        row = console.row("calls", call["id"])
        assert row is not None
        assert (row["tokens"], row["resumes"], row["outcome"]) == (400, 1, "ok")
    assert console.names[0] == "state"


async def test_the_verb_returns_the_document(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The admin method GetOverview returns the overview document that the console shows. The document lists calls only
    if the request asks for them."""
    worker = await cluster.add_worker(sim_engine(checkpoint), bundle)
    await cluster.stub.Chat(chat())
    async with AdminClient(cluster.gateway.endpoints["admin"]) as admin:
        answer = await admin.ask("Fleet.GetOverview", pb.GetOverviewRequest(with_calls=True))
        document = json.loads(answer.document)
        assert [row["id"] for row in document["workers"]] == [worker.identity.worker_id]
        (call,) = document["calls"]
        assert (call["state"], call["worker"], call["tokens"]) == ("ended", worker.identity.worker_id, 16)
        answer = await admin.ask("Fleet.GetOverview", pb.GetOverviewRequest())
        assert json.loads(answer.document)["calls"] == []
