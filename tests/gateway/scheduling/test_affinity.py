"""Affinity keys through a real gateway: calls of a tenant with the same key go to one worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from cluster.wire.bundle import Bundle
from tests.support.calls import complete
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine
from tests.support.http import client, completion_body

HEADER = "x-headrace-affinity"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Provide a running gateway without workers, at which an affinity key outweighs any load."""
    async with running_cluster(tmp_path, LOOPBACK + "routing: {weights: {affinity_tokens: 1.0e+9}}\n") as cluster:
        yield cluster


async def test_calls_with_one_key_go_to_one_worker(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Calls without a key go to idle workers in turn. Calls with one key go to one worker, over gRPC and over HTTP.

    Several keys use several workers.
    """
    engines = [sim_engine(checkpoint, decode_ms=0.2) for _ in range(3)]
    for engine in engines:
        await cluster.add_worker(engine, bundle)
    submitted = Counter[int]()

    async def homes(key: str, over_http: bool = False) -> set[int]:
        """Send four calls with this key, and return the numbers of the engines that get them."""
        for _ in range(4):
            if over_http:
                async with client(cluster) as ai:
                    await ai.completions.create(**completion_body(max_tokens=2), extra_headers={HEADER: key})
            else:
                await cluster.stub.Complete(complete(max_tokens=2, affinity_key=key))
        before = submitted.copy()
        submitted.update({at: engine.statistics().submitted - before[at] for at, engine in enumerate(engines)})
        return {at for at in range(3) if submitted[at] > before[at]}

    assert await homes("") == {0, 1, 2}
    by_key = {key: await homes(key) for key in "abcdefgh"}
    assert all(len(engine) == 1 for engine in by_key.values())
    assert len(set.union(*by_key.values())) > 1
    for key in "abc":
        assert await homes(key, over_http=True) == by_key[key]


async def test_a_long_key_over_http_is_refused(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """An affinity key of more than 256 characters is refused, and the error names the header."""
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    async with client(cluster) as ai:
        await ai.completions.create(**completion_body(max_tokens=2), extra_headers={HEADER: "k" * 256})
        with pytest.raises(openai.BadRequestError, match=HEADER):
            await ai.completions.create(**completion_body(max_tokens=2), extra_headers={HEADER: "k" * 257})
