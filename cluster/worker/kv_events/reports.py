"""Reports of a worker's KV blocks to its gateways: first all blocks on a new link, then the changes.

Changes are collected for INTERVAL_S seconds and sent to all links. A decoding engine fills some blocks in every step,
and one message per step would cost each gateway more than the reports are worth. The gateway that sent a prompt expects
the prompt's blocks anyway, so it needs no early report. So changes are added to the next message that is sent for
another reason, such as the outputs of a step or a heartbeat.

On a new link, the blocks are sent in several messages, and other work runs between these. Each message contains only
blocks that the engine still holds when the message is made. So a gateway has the right blocks if it applies all
messages in the order in which they were sent.
"""

from __future__ import annotations

import asyncio

from cluster.api.ports import KvEventSource
from cluster.policy.kv_cache.changes import KvChange
from cluster.wire.codecs.kv_codec import BLOCKS_PER_MESSAGE, kv_blocks_to_pb
from cluster.wire.outbox import Outbox
from cluster.worker.kv_events.mirror import KvMirror

INTERVAL_S = 0.1


class KvReports:
    """The reports about one engine's KV blocks that a worker sends on all its links."""

    def __init__(self, source: KvEventSource | None, block_size: int) -> None:
        """`source`: the engine's KV events; None if the engine never emits KV events, so that nothing is reported.
        `block_size`: number of tokens in a KV block."""
        self._source = source
        self._mirror = KvMirror(block_size)
        self._outboxes: dict[int, Outbox] = {}
        self._snapshots: dict[int, asyncio.Task[None]] = {}

    def attach(self, number: int, outbox: Outbox) -> None:
        """Add a link: report all blocks to its gateway now, and changes later."""
        if self._source is not None:
            self._send({number: outbox}, KvChange(is_reset=True))
            self._outboxes[number] = outbox
            self._snapshots[number] = asyncio.create_task(self._send_snapshot(number, outbox))

    def detach(self, number: int) -> None:
        """Stop reporting to a link that has ended."""
        self._outboxes.pop(number, None)
        if (task := self._snapshots.pop(number, None)) is not None:
            task.cancel()

    async def run(self) -> None:
        """Report changes of the blocks to all links until cancelled."""
        if self._source is None:
            await asyncio.Event().wait()
            return
        while True:
            self._mirror.apply(await self._source.kv_events())
            self._send(self._outboxes, self._mirror.pop_change(), wakes=False)
            await asyncio.sleep(INTERVAL_S)

    async def _send_snapshot(self, number: int, outbox: Outbox) -> None:
        """Send all blocks over a new link.

        `attach` has sent a reset before, after which the gateway knows no blocks.
        """
        block_ids = self._mirror.block_ids()
        for at in range(0, len(block_ids), BLOCKS_PER_MESSAGE):
            hashes = self._mirror.hashes_of(block_ids[at : at + BLOCKS_PER_MESSAGE])
            self._send({number: outbox}, KvChange(stored=hashes))
            await asyncio.sleep(0)
        self._snapshots.pop(number, None)

    @staticmethod
    def _send(outboxes: dict[int, Outbox], change: KvChange, *, wakes: bool = True) -> None:
        if change:
            messages = list(kv_blocks_to_pb(change))
            for outbox in outboxes.values():
                outbox.kv_blocks(messages, wakes=wakes)
