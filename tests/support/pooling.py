"""Clusters with simulated pooling workers (embeddings and scores), and readers of vectors."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cluster.api.ports import Engine
from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, TokenOutput
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.cluster import TestCluster, running_cluster, sim_engine

DIMENSIONS = 8
EMBEDDER: dict[str, Any] = {"embed_dimensions": DIMENSIONS, "any_dimensions": 1}
Vectors = np.ndarray[Any, np.dtype[np.float32]]


@asynccontextmanager
async def pooling_cluster(folder: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[TestCluster]:
    """Run a gateway with an embedding model `embed`, a cross-encoder `score` and a generating model `sim`."""
    async with running_cluster(folder) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, max_model_len=64, **EMBEDDER), bundle, model="embed")
        await cluster.add_worker(sim_engine(checkpoint, max_model_len=64, scores=1), bundle, model="score")
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        yield cluster


def vectors_of(values: Sequence[Any]) -> Vectors:
    """Return vectors as a matrix of float32. `values`: lists of numbers, or base64 of little-endian float32."""
    rows = [
        np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else np.array(v, np.float32) for v in values
    ]
    return np.stack(rows).astype(np.float32)


async def embedded(cluster: TestCluster, texts: Sequence[str], model: str = "embed", **fields: Any) -> Vectors:
    """Return the vectors of texts, over gRPC."""
    answer = await cluster.stub.Embed(pb.EmbedRequest(model=model, texts=texts, **fields))
    return vectors_of([one.values for one in answer.embeddings])


class Tampered:
    """Wrapper of a simulated engine that changes the engine's outputs."""

    def __init__(self, engine: Engine, change: Any) -> None:
        """`change`: function that changes an output in place; it is called with each output."""
        self._engine = engine
        self._change = change
        self.submitted: list[EngineRequest] = []

    async def start(self) -> EngineInfo:
        """Implements `Engine.start`."""
        return await self._engine.start()

    async def submit(self, request: EngineRequest) -> None:
        """Implements `Engine.submit`."""
        self.submitted.append(request)
        await self._engine.submit(request)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Implements `Engine.abort`."""
        await self._engine.abort(request_ids)

    async def step(self) -> Sequence[TokenOutput]:
        """Implements `Engine.step`."""
        outputs = await self._engine.step()
        for output in outputs:
            self._change(output)
        return outputs

    def load(self) -> EngineLoad:
        """Implements `Engine.load`."""
        return self._engine.load()

    async def check(self) -> None:
        """Implements `Engine.check`."""
        await self._engine.check()

    async def close(self) -> None:
        """Implements `Engine.close`."""
        await self._engine.close()
