"""Loss of a model's last worker. Calls wait for the next worker if the catalog still has the model."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from cluster.api.demand import ClassCounts
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster, sim_engine, until

QUICK = Timing(redial_min_s=0.05, redial_max_s=0.1)


async def test_calls_wait_for_a_worker_that_comes_back(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway without a catalog keeps the context length and the tokenizer of a model's last worker. A later call is
    encoded, waits, and is answered by the next worker."""
    engine = sim_engine(checkpoint, decode_ms=1, max_model_len=64)
    await cluster.add_worker(engine, bundle, timing=QUICK)
    cluster.gateway.hub.links[0].close("as if it had been taken for silent")
    await until(lambda: not cluster.gateway.hub.links, "it is gone")
    calls = [asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True))) for _ in range(4)]
    answer = await refused(cluster.stub.Chat(chat("a " * 100)))
    assert answer.fields == ["messages"], answer
    assert [one.usage.completion_tokens for one in await asyncio.gather(*calls)] == [5] * 4


async def test_what_the_catalog_has_let_go_is_refused(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If a model is no longer in the catalog, its calls are refused after its last worker has left."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    assert (await cluster.stub.Chat(chat(max_tokens=2, ignore_eos=True))).choices, "the tokenizer is here, too"
    cluster.gateway.worker_events.apply_catalog([])
    await worker.stop()
    await until(lambda: not cluster.gateway.hub.links, "it is gone")
    answer = await refused(cluster.stub.Chat(chat()))
    assert (answer.code.name, answer.reason) == ("UNAVAILABLE", "NO_WORKER"), answer
    assert "its last worker left" in answer.message


async def test_a_stream_that_lost_it_is_demand_from_then_on(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A stream that has lost its worker counts as waiting demand, like a new call, until it has resumed."""

    def class_counts() -> ClassCounts:
        ((counts,),) = [model.classes for model in cluster.gateway.dispatch.demand.current()]
        return counts

    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=2), bundle)
    began = time.monotonic()
    stream = cluster.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True))
    for _ in range(100):
        await stream.read()
    await worker.stop()
    lost = time.monotonic()
    await until(lambda: class_counts().held_requests == 1, "it is held")
    assert class_counts().queued_requests == 1
    assert class_counts().oldest_wait_s <= time.monotonic() - lost + (lost - began) / 2
    assert class_counts().arrived_requests == 1, "it came once"
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.1), bundle)
    await until(lambda: class_counts().queued_requests == 0, "the sequence has resumed")
    stream.cancel()
