"""Embeddings over HTTP and gRPC: vectors, usage, forms of the input, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.cluster import TestCluster, running_cluster, sim_engine
from tests.support.http import client


@pytest.fixture
async def cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[TestCluster]:
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, embed_dimensions=8, any_dimensions=1), bundle)
        yield cluster


async def test_openai(cluster: TestCluster) -> None:
    async with client(cluster) as ai:
        a = await ai.embeddings.create(model="sim", input=["a", "b", "a"])
        print(a)
        b = await ai.embeddings.create(model="sim", input="a", encoding_format="float")
        print(b)
    r = await cluster.stub.Embed(pb.EmbedRequest(model="sim", texts=["a", "b"]))
    print(r)
    await cluster.until_idle()
