"""Tests of a worker's reports of its KV blocks to several gateways."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.api.kv_events import BlocksCleared, BlocksRemoved, BlocksStored, KvEvent
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.wire.codecs.kv_codec import BLOCKS_PER_MESSAGE, kv_blocks_from_pb
from cluster.wire.outbox import Outbox
from cluster.worker.kv_events.reports import KvReports

SIZE = 4


class Events:
    """A source of events, which a test puts into its queue. Implements KvEventSource."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Sequence[KvEvent]] = asyncio.Queue()

    async def kv_events(self) -> Sequence[KvEvent]:
        """Implements `KvEventSource.kv_events`."""
        return await self.queue.get()


async def heartbeats(*outboxes: Outbox) -> None:
    """Wake the writers of these outboxes repeatedly, as a link's heartbeats do."""
    while True:
        for outbox in outboxes:
            outbox.flush()
        await asyncio.sleep(0.01)


async def known(outbox: Outbox, held: set[int], wanted: set[int]) -> set[int]:
    """Read messages from an outbox until the reported blocks equal `wanted`; return these blocks. `held`: blocks that
    were reported before."""
    async with asyncio.timeout(60):
        while held != wanted:
            message = await outbox.next_message()
            if message.HasField("kv_blocks"):
                change = kv_blocks_from_pb(message.kv_blocks)
                held = (set() if change.is_reset else held) - set(change.removed.tolist()) | set(change.stored.tolist())
    return held


async def test_every_gateway_knows_all_blocks_whenever_it_has_connected() -> None:
    hashes = list(map(int, prefix_hashes(range(3 * SIZE), SIZE, seed_of(""))))
    source, early, late = Events(), Outbox(), Outbox()
    reports = KvReports(source, SIZE)
    running = asyncio.gather(reports.run(), heartbeats(early, late))
    try:
        reports.attach(1, early)
        source.queue.put_nowait([BlocksStored([1, 2], None, range(2 * SIZE), SIZE)])
        held = await known(early, set(), set(hashes[:2]))
        reports.attach(2, late)
        other = await known(late, set(), set(hashes[:2]))
        source.queue.put_nowait([BlocksStored([3], 2, range(2 * SIZE, 3 * SIZE), SIZE), BlocksRemoved([1])])
        held, other = await known(early, held, set(hashes[1:])), await known(late, other, set(hashes[1:]))
        reports.detach(1)
        source.queue.put_nowait([BlocksCleared()])
        assert not await known(late, other, set())
        late.flush()
        assert not (await late.next_message()).HasField("kv_blocks")
    finally:
        running.cancel()


async def test_a_large_report_is_sent_in_pieces_between_which_other_work_runs() -> None:
    """When a gateway connects, a worker sends it the list of all KV blocks in several messages. Changes that occur
    meanwhile are sent too."""
    count = 5 * BLOCKS_PER_MESSAGE + 7
    hashes = list(map(int, prefix_hashes(range(count * SIZE), SIZE, seed_of(""))))
    source, early, late = Events(), Outbox(), Outbox()
    reports = KvReports(source, SIZE)
    running = asyncio.gather(reports.run(), heartbeats(early, late))
    try:
        reports.attach(1, early)
        source.queue.put_nowait([BlocksStored(range(count), None, range(count * SIZE), SIZE)])
        held = await known(early, set(), set(hashes))
        reports.attach(2, late)
        await asyncio.sleep(0)
        source.queue.put_nowait([BlocksRemoved([0, count - 1]), BlocksStored([0], None, range(SIZE), SIZE)])
        sizes = []
        other: set[int] = set()
        async with asyncio.timeout(60):
            while other != set(hashes[:-1]):
                message = await late.next_message()
                change = kv_blocks_from_pb(message.kv_blocks)
                sizes.append(len(change.stored))
                other = other - set(change.removed.tolist()) | set(change.stored.tolist())
        assert max(sizes) <= BLOCKS_PER_MESSAGE
        await known(early, held, set(hashes[:-1]))
    finally:
        running.cancel()


async def test_a_link_that_ends_gets_no_more_pieces() -> None:
    count = 3 * BLOCKS_PER_MESSAGE
    source, early, late = Events(), Outbox(), Outbox()
    reports = KvReports(source, SIZE)
    running = asyncio.gather(reports.run(), heartbeats(early, late))
    try:
        reports.attach(1, early)
        source.queue.put_nowait([BlocksStored(range(count), None, range(count * SIZE), SIZE)])
        await known(early, set(), set(map(int, prefix_hashes(range(count * SIZE), SIZE, seed_of("")))))
        reports.attach(2, late)
        reports.detach(2)
        await asyncio.sleep(0)
        assert (await late.next_message()).kv_blocks.is_reset
        late.flush()
        assert not (await late.next_message()).HasField("kv_blocks")
    finally:
        running.cancel()


async def test_an_engine_without_events_is_not_reported() -> None:
    outbox = Outbox()
    KvReports(None, SIZE).attach(1, outbox)
    outbox.flush()
    assert not (await outbox.next_message()).HasField("kv_blocks")
