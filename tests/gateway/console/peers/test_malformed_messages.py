"""Messages of other gateway processes that have another form than this release sends."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.gateway.console.overview import deltas, overview
from cluster.gateway.console.overview.parts import Part
from cluster.gateway.console.peers.peers import PeerParts, check_columns, part_for_peers
from cluster.gateway.console.peers.valkey_peers import PARTS, QUESTIONS, ValkeyPeers
from cluster.wire.bundle import Bundle
from tests.support.calls import chat
from tests.support.cluster import TestCluster, running_cluster, sim_engine

JUNK: list[Any] = [None, True, 7, -1.5, "text", [], [None], ["x"], {}, {"x": []}, 10**18]


@pytest.fixture
async def cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[TestCluster]:
    """Provide a gateway with a worker, which has served a call."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.2), bundle)
        await cluster.stub.Chat(chat(max_tokens=2))
        yield cluster


async def peer_part(cluster: TestCluster) -> Part:
    """Return a gateway's part as another gateway receives it."""
    part = part_for_peers(await cluster.gateway.live.part(), True)
    received: Part = orjson.loads(orjson.dumps(part))
    received["gateway"]["id"] = "other"
    received["tenants"][0]["budget"] = {"name": "daily", "used": 1, "limit": 2, "currency": "tokens"}
    return received


def changed(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value in which one part is replaced by junk or removed."""
    yield from JUNK
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for other in changed(value[key]):
            copied = copy.copy(value)
            copied[key] = other
            yield copied
        if isinstance(value, dict):
            yield {name: each for name, each in value.items() if name != key}


async def test_a_malformed_part_is_dropped(cluster: TestCluster) -> None:
    """Whatever part another process sends, it is refused, or it is merged into a document that can be encoded."""
    own, part = await cluster.gateway.live.part(), await peer_part(cluster)
    refused = merged = 0
    for broken in changed(part):
        if not isinstance(broken, dict):
            continue
        parts = PeerParts()
        try:
            parts.put(broken, 0.0)
        except (ValueError, KeyError, TypeError, AttributeError):
            refused += 1
            continue
        document = await overview.merge([own, *parts.current(0.0)], own["at"])
        await deltas.encode(document)
        deltas.index_of(document | {"scaling": []})
        merged += 1
    assert merged > 100
    assert refused > 1000


async def test_refused_messages_are_counted(cluster: TestCluster) -> None:
    """A malformed message is counted, and the parts that came before it stay."""
    asked: list[Any] = []

    async def answer(question: Any) -> None:
        asked.append(question)

    peers = ValkeyPeers("redis://127.0.0.1:1/0", "me", answer)
    part = await peer_part(cluster)

    def send(channel: str, **message: Any) -> None:
        peers._handle(channel, orjson.dumps({"from": "other", **message}))

    send(PARTS, number=1, piece={"part": part, "pieces": 1})
    send(PARTS, number=2, piece={"part": part | {"workers": [{"id": 5}]}, "pieces": 1})
    send(PARTS, number=3, piece={"list": "no such", "rows": 5})
    peers._handle(PARTS, b"[" * 100_000)
    assert peers.refused == 2
    assert [each["workers"] for each in peers._parts.current(peers._clock())] == [part["workers"]]
    for _ in range(200):
        send(QUESTIONS, kind="part", has_all=True)
        send(QUESTIONS, kind="history", query={}, number=1)
    assert len(peers._answering) <= 16
    await asyncio.gather(*peers._answering)
    assert sum(each["kind"] == "part" for each in asked) == 1
    await peers.close()


@pytest.mark.parametrize("columns", [None, [], {"a": 5}, {"a": ["x"]}, {"a": [[1.0]]}])
def test_malformed_columns_are_refused(columns: Any) -> None:
    """Columns of the history that are not lists of numbers are refused."""
    with pytest.raises(ValueError, match="columns"):
        check_columns(columns)
    assert check_columns({"a": [1.0, None]}) == {"a": [1.0, None]}
