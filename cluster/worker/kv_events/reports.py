"""Reports of a worker's KV blocks to its gateways: all blocks on a new link, then the changes.

Changes are collected for INTERVAL_S and sent to all links. A decoding engine fills some blocks in every step, and a
message a step would cost each gateway more than the blocks are worth. The gateway that sent a prompt expects its blocks
anyway, so it does not need an early report.
"""

from __future__ import annotations

import asyncio

from cluster.api.ports import KvEventSource
from cluster.policy.kv_cache.changes import KvChange
from cluster.wire.kv_codec import kv_blocks_to_pb
from cluster.wire.outbox import Outbox
from cluster.worker.kv_events.mirror import KvMirror

INTERVAL_S = 0.1


class KvReports:
    """Reports the blocks of one engine to all links of a worker."""

    def __init__(self, source: KvEventSource | None, block_size: int) -> None:
        """`source`: None for an engine without events, of which nothing is reported."""
        self._source = source
        self._mirror = KvMirror(block_size)
        self._outboxes: dict[int, Outbox] = {}

    def attach(self, number: int, outbox: Outbox) -> None:
        """Report all blocks on a new link, then the changes."""
        if self._source is not None:
            self._send(self._outboxes, self._mirror.pop_change())  # the new link gets them with the snapshot
            self._outboxes[number] = outbox
            self._send({number: outbox}, self._mirror.snapshot())

    def detach(self, number: int) -> None:
        """Stop reporting on a link."""
        self._outboxes.pop(number, None)

    async def run(self) -> None:
        """Report until cancelled."""
        if self._source is None:
            await asyncio.Event().wait()
            return
        while True:
            self._mirror.apply(await self._source.kv_events())
            self._send(self._outboxes, self._mirror.pop_change())
            await asyncio.sleep(INTERVAL_S)

    @staticmethod
    def _send(outboxes: dict[int, Outbox], change: KvChange) -> None:
        if change:
            messages = list(kv_blocks_to_pb(change))
            for outbox in outboxes.values():
                outbox.kv_blocks(messages)
