"""Use of a worker's slots with one, two and eight real gateways. The slots are filled, and the engine's queue stays
short."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cluster.api.types import WorkerIdentity
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimEngine
from cluster.worker.session import WorkerSession
from tests.support.calls import complete
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until

PLACES, CALLS, TOKENS = 8, 24, 25


class Watch:
    """Counter of engine steps at which a slot was free while a call waited at a gateway. It counts steps instead of
    seconds, because on a busy machine the steps pause together with this process."""

    def __init__(self, clusters: list[TestCluster], end: WorkerSession, engine: SimEngine) -> None:
        self._clusters = clusters
        self._end = end
        self._engine = engine
        self.longest_steps = 0

    async def run(self) -> None:
        """Check slots and queues every few milliseconds. Runs until cancelled."""
        since, running = 0, 0
        while True:
            step, were = self._engine.statistics().steps, running
            running = self._end.statistics().running
            waiting = any(one.gateway.scheduler.queues.waiting("sim")[0] for one in self._clusters)
            if running >= PLACES or not waiting or running > were:
                since = step
            self.longest_steps = max(self.longest_steps, step - since)
            await asyncio.sleep(0.003)


@pytest.mark.slow
@pytest.mark.parametrize("gateways", [1, 2, 8])
async def test_places_are_filled_and_the_engines_queue_is_short(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, gateways: int
) -> None:
    """A worker's free slots go to the gateways at which calls wait. Three times as many calls as slots arrive, first at
    one half of the gateways and then at the other half. At most two calls wait in the engine, and no slot is free for
    200 ms while a call waits."""
    async with AsyncExitStack() as stack:
        clusters = [await stack.enter_async_context(running_cluster(tmp_path / f"{i}")) for i in range(gateways)]
        engine = sim_engine(checkpoint, decode_ms=10, max_num_seqs=PLACES)
        end = WorkerSession(
            identity=WorkerIdentity("w", "1", "sim", bundle_digest=bundle.digest),
            engine=engine,
            info=await engine.start(),
            bundle=bundle,
            gateways=[one.gateway.endpoints["link"] for one in clusters],
        )
        run = asyncio.create_task(end.run())
        stack.push_async_callback(lambda: asyncio.wait([run]))
        stack.push_async_callback(end.close)
        await until(lambda: all(one.gateway.hub.links for one in clusters), "the worker is linked to every gateway")
        watch = Watch(clusters, end, engine)
        looking = asyncio.create_task(watch.run())
        half = (gateways + 1) // 2
        for some in (clusters[:half], clusters[half:] or clusters):
            calls = [
                asyncio.ensure_future(
                    some[i % len(some)].stub.Complete(
                        complete(f"{'word ' * 60}{i}", max_tokens=TOKENS, ignore_eos=True)
                    )
                )
                for i in range(CALLS)
            ]
            answers = await asyncio.gather(*calls)
            assert all(answer.usage.completion_tokens == TOKENS for answer in answers)
        looking.cancel()
        assert watch.longest_steps <= 20, "200 ms"
        assert engine.statistics().most_waiting <= 2
        steps = 2 * CALLS * TOKENS / PLACES
        assert engine.statistics().steps <= 1.5 * steps, "places stood empty"
