"""Conversion of changes of KV blocks to messages of link.v1 and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.prefix_hashes import Hashes

BLOCKS_PER_MESSAGE: Final = 512
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
    if len(changes) < 2:
        return changes[0] if changes else KvChange(False)
    first = max((number for number, change in enumerate(changes) if change.is_reset), default=0)
    changes, is_reset = changes[first:], changes[first].is_reset
    parts = [part for change in changes for part in (change.removed, change.stored)]
    is_stored = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
    # The last change of a block counts: of equal hashes, `unique` returns the first one, here of the reversed array.
    hashes, at = np.unique(np.concatenate(parts)[::-1], return_index=True)
    is_held = is_stored[::-1][at]
    return KvChange(is_reset, hashes[is_held], hashes[:0] if is_reset else hashes[~is_held])


def _packed(hashes: Hashes) -> bytes:
    return hashes.astype("<u8", copy=False).tobytes()


def _unpacked(data: bytes) -> Hashes:
    return np.frombuffer(data, "<u8").astype(np.uint64, copy=False)
