"""vLLM's KV events, sent by vLLM's own publisher: missed batches are requested again, and the events stay in order."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.api.kv_events import BlocksCleared, BlocksRemoved, BlocksStored
from cluster.worker.engine.vllm.kv_events import KvEventSocket

pytestmark = pytest.mark.engine


async def test_batches_published_before_the_subscription_are_requested_again(tmp_path: Path) -> None:
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    events = KvEventSocket(tmp_path)
    config = events.config()
    publisher = ZmqEventPublisher(0, config.endpoint, config.replay_endpoint)

    def publish(number: int) -> None:
        block = BlockStored([number], None, [1, 2], 2, None, "GPU", None, extra_keys=[("salt",)], group_idx=0)
        publisher.publish(KVEventBatch(0.0, [block]))

    try:
        for number in range(20):
            publish(number)
        seen: list[object] = []
        async with asyncio.timeout(60):
            while len(seen) <= 20:
                reading = asyncio.create_task(events.kv_events())
                while not reading.done():  # a subscriber hears nothing until it is connected
                    publish(20)
                    await asyncio.wait([reading], timeout=0.1)
                seen += [event.blocks[0] for event in await reading if isinstance(event, BlocksStored)]
        assert seen[:20] == list(range(20))
        assert set(seen[20:]) == {20}
    finally:
        events.close()
        publisher.shutdown()


async def test_events_lost_for_good_clear_the_cache(tmp_path: Path) -> None:
    """If the engine no longer has some of the missed batches, the cache counts as cleared after the others, since the
    lost batches may have removed blocks."""
    import zmq.asyncio
    from vllm.distributed.kv_events import BlockStored, KVEventBatch, ZmqEventPublisher

    events = KvEventSocket(tmp_path)
    config = events.config()
    publisher = ZmqEventPublisher(0, config.endpoint, config.replay_endpoint, buffer_steps=4)

    def publish(number: int) -> None:
        publisher.publish(KVEventBatch(0.0, [BlockStored([number], None, [1, 2], 2, None, "GPU", None, group_idx=0)]))

    try:
        async with asyncio.timeout(60):
            with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as early:
                early.subscribe(b"")
                early.connect(config.endpoint)
                sent = 0
                while sent < 20:  # the publisher sends from a thread of its own, at a time of its own
                    publish(0)
                    if await early.poll(100):
                        sent = int.from_bytes((await early.recv_multipart())[1], "big")
            publish(1)
            seen: list[object] = []
            while not any(isinstance(event, BlocksStored) and event.blocks[0] == 2 for event in seen):
                reading = asyncio.create_task(events.kv_events())
                while not reading.done():
                    publish(2)
                    await asyncio.wait([reading], timeout=0.1)
                seen += await reading
        assert sum(isinstance(event, BlocksCleared) for event in seen) == 1
        before, after = seen[: (at := seen.index(BlocksCleared()))], seen[at + 1 :]
        assert len(before) <= 4
        assert after
    finally:
        events.close()
        publisher.shutdown()


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", None])
async def test_blocks_of_all_tokens_alone_are_reported(tmp_path: Path, kind: str | None) -> None:
    """Blocks of layers with full attention are reported. Blocks of layers with a sliding window are not, and neither
    are a KV connector's copies of blocks in the CPU's memory."""
    from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

    events = KvEventSocket(tmp_path)
    config = events.config()
    publisher = ZmqEventPublisher(0, config.endpoint, config.replay_endpoint)

    def stored(number: int, group: int, kind: str | None) -> BlockStored:
        return BlockStored([number], None, [1], 1, None, "GPU", None, group_idx=group, kv_cache_spec_kind=kind)

    window = [stored(1, 1, "sliding_window"), BlockRemoved([1], "GPU", 1)]
    copied = BlockStored([3], None, [], 0, None, "CPU", None, group_idx=0)
    dropped = BlockRemoved([4], "CPU", 0)
    batch = KVEventBatch(0.0, [*window, stored(2, 0, kind), copied, dropped, BlockRemoved([2], "GPU", 0)])
    try:
        seen: list[object] = []
        async with asyncio.timeout(60):
            reading = asyncio.create_task(events.kv_events())
            while not reading.done():
                publisher.publish(batch)
                await asyncio.wait([reading], timeout=0.1)
            seen += await reading
        assert {tuple(event.blocks) for event in seen if isinstance(event, BlocksStored | BlocksRemoved)} == {(2,)}
        assert {type(event) for event in seen} == {BlocksStored, BlocksRemoved}
    finally:
        events.close()
        publisher.shutdown()
