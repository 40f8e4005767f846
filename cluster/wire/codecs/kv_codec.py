"""Conversion of changes of KV blocks to messages of link.v1 and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.prefix_hashes import Hashes

BLOCKS_PER_MESSAGE: Final = 1024
"""Maximum number of blocks in a sent message. A gateway needs about half a millisecond to apply the message, and its
event loop is blocked meanwhile."""


def kv_blocks_to_pb(change: KvChange) -> Iterator[pb.KvBlocks]:
    """Encode a change as one or more messages, which the receiver must apply in order."""
    removed, stored, is_reset = change.removed, change.stored, change.is_reset
    while True:
        part = removed[:BLOCKS_PER_MESSAGE]
        room = BLOCKS_PER_MESSAGE - len(part)
        yield pb.KvBlocks(is_reset=is_reset, removed=_packed(part), stored=_packed(stored[:room]))
        removed, stored, is_reset = removed[len(part) :], stored[room:], False
        if not (len(removed) or len(stored)):
            return


def kv_blocks_from_pb(message: pb.KvBlocks) -> KvChange:
    """Decode the change in a message. The caller must have checked the message with `check_kv_blocks`."""
    return KvChange(message.is_reset, _unpacked(message.stored), _unpacked(message.removed))


def joined_changes(changes: Sequence[KvChange]) -> KvChange:
    """Return one change that has the same effect as all the given changes in order."""
    if len(changes) == 1:
        return changes[0]
    held: dict[int, bool] = {}
    is_reset = False
    for change in changes:
        if change.is_reset:
            held.clear()
            is_reset = True
        held.update(dict.fromkeys(change.removed.tolist(), False))
        held.update(dict.fromkeys(change.stored.tolist(), True))
    stored = [value for value, is_held in held.items() if is_held]
    removed = [] if is_reset else [value for value, is_held in held.items() if not is_held]
    return KvChange(is_reset, np.array(stored, np.uint64), np.array(removed, np.uint64))


def _packed(hashes: Hashes) -> bytes:
    return hashes.astype("<u8", copy=False).tobytes()


def _unpacked(data: bytes) -> Hashes:
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)
