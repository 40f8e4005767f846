"""A stopped gateway (SIGSTOP) beside a second gateway. Streams at the second gateway keep the engine's pace, and
streams at the stopped gateway continue later."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from tests.support.calls import chat, rest_of, text_of
from tests.support.cluster import TestCluster, Worker, sim_engine, until
from tests.support.gateway_process import GatewayProcess, gateway_process

pytestmark = pytest.mark.slow

STREAMS, TOKENS = 4, 1200
SILENCE_S = 1.5
"""Seconds of silence after which the worker closes the link to a gateway."""


@pytest.fixture
async def other(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    """Provide a second gateway, in a separate process."""
    async with gateway_process(tmp_path / "other") as made:
        yield made


async def linked_to_both(cluster: TestCluster, other: GatewayProcess, checkpoint: Path, bundle: Bundle) -> Worker:
    """Add a worker that is linked to both gateways and has slots for the streams of both."""
    engine = sim_engine(checkpoint, decode_ms=4, max_num_seqs=32, kv_blocks=4096)
    links = [cluster.gateway.endpoints["link"], other.link]
    timing = Timing(silence_s=SILENCE_S, redial_min_s=0.05, redial_max_s=0.1)
    worker = await cluster.add_worker(engine, bundle, gateways=links, timing=timing)
    await until(lambda: worker.end.statistics().links == 2, "the worker has dialled both")
    return worker


@pytest.mark.parametrize("long", [pytest.param(False, marks=pytest.mark.long), True], ids=["for-a-moment", "for-long"])
async def test_a_stopped_gateway_slows_nobody(
    cluster: TestCluster, other: GatewayProcess, checkpoint: Path, bundle: Bundle, long: bool
) -> None:
    """While one gateway process is stopped by SIGSTOP, a stream at another gateway gets a token from every step. After
    a long stop, the stopped gateway's calls have left the engine; when the gateway continues, it resumes them. After a
    short stop, its streams continue without a resume. In both cases all its streams end with the whole text."""
    worker = await linked_to_both(cluster, other, checkpoint, bundle)
    request = chat(max_tokens=TOKENS, ignore_eos=True)
    whole = text_of([chunk async for chunk in cluster.stub.StreamChat(request)])
    streams = [other.stub.StreamChat(request, wait_for_ready=True) for _ in range(STREAMS)]
    begun = [await stream.read() for stream in streams]
    os.kill(other.pid, signal.SIGSTOP)
    try:
        before = worker.engine.load().steps
        answer = await cluster.stub.Chat(chat(max_tokens=200, ignore_eos=True), timeout=60)
        assert worker.engine.load().steps - before <= 230, "a step gives a token: nothing waited for the stopped one"
        assert answer.usage.completion_tokens == 200
        if long:
            await until(lambda: worker.end.statistics().links == 1, "the worker has let go of it")
            await until(lambda: worker.engine.load().running == 0, "its streams hold no place")
            assert (await cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True))).usage.completion_tokens == 5
    finally:
        os.kill(other.pid, signal.SIGCONT)
    ended = [[first, *await rest_of(stream)] for first, stream in zip(begun, streams, strict=True)]
    assert [text_of(chunks) for chunks in ended] == [whole] * STREAMS
    resumed = [chunks[-1].usage.resumed for chunks in ended]
    if long:
        assert all(resumed), "the worker had closed the link"
    else:
        assert resumed == [0] * STREAMS, "a pause of its own is no worker's loss"
