"""Long prompts that wait for the tokenizer count against the budget of request bytes, on every API."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import complete, refused, rest_of
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.http import fetch

pytestmark = pytest.mark.slow

CALLS = 6
TEXT = "word " * 1_600_000
"""A prompt of 8 MB, which is too long for the model. Its tenant may have 32 MiB of bodies in the gateway."""


async def unary(cluster: TestCluster) -> None:
    """Make one call over gRPC."""
    assert (await refused(cluster.stub.Complete(complete(TEXT)))).reason == "CONTEXT_LENGTH_EXCEEDED"


async def over_http(cluster: TestCluster) -> None:
    """Make one call over HTTP."""
    assert (await fetch(cluster, "/v1/completions", {"model": "sim", "prompt": TEXT})).status == 400


async def in_session(cluster: TestCluster) -> None:
    """Make one call in a session of its own."""
    session = cluster.stub.Session()
    start = pb.SessionStart(call_id=1, complete=complete(TEXT))
    await session.write(pb.SessionRequest(start=start))
    await session.done_writing()
    (ended,) = await rest_of(session)
    assert [bool(event.status) for event in ended.events] == [True]


@pytest.mark.parametrize("make", [unary, over_http, in_session])
async def test_prompts_that_wait_for_the_tokenizer_are_in_the_budget(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, make: Callable[[TestCluster], Awaitable[Any]]
) -> None:
    """While the tokenizer's processes stand still, the bodies of a tenant's calls stay in the budget, and further
    bodies wait. Then all calls are answered, and nothing stays reserved."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        gateway = cluster.gateway
        await make(cluster)  # starts the processes
        (model,) = gateway.directory.models
        text = await gateway.directory.text_model(model)
        pool, budget = text._jobs._pool, gateway.request_bytes
        assert pool is not None
        pool.patience_s = 60.0
        assert await pool.ready()
        for pid in pool.pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            calls = [asyncio.ensure_future(make(cluster)) for _ in range(CALLS)]
            await until(lambda: budget.held > 24 << 20 and budget.waiting >= CALLS - 4, "bodies wait for the budget")
            assert budget.held <= budget.bounds.tenant
        finally:
            for pid in pool.pids:
                os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*calls)
        await cluster.until_idle()
        await until(lambda: (budget.held, budget.waiting) == (0, 0), "nothing stays reserved")
