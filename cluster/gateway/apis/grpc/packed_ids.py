"""Decoding of token ids from serialized protobuf messages into arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.wire.message_scan import read_varint

Ids = np.ndarray[Any, np.dtype[Any]]
"""Array of whole numbers, of one byte each if all numbers are below 128, else of 32 bits each."""


def packed_ids(data: bytes | bytearray, number: int) -> Ids | None:
    """Return the 32-bit numbers of a top-level field in a valid message; None if the field is not packed. `number`: the
    field number. Takes half the time that protobuf needs to build its own list."""
    at, parts = 0, []
    while at < len(data):
        tag, at = read_varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, at = read_varint(data, at)
            if tag >> 3 == number:
                parts.append(data[at : at + length])
            at += length
        elif wire == 0 and tag >> 3 != number:
            at = read_varint(data, at)[1]
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            return None
    return _decoded(np.frombuffer(b"".join(parts), np.uint8))


def _decoded(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Ids:
    """Decode varints. Numbers are truncated to 32 bits, as protobuf does."""
    if not data.size or data.max() < 128:  # one byte for each number, a quarter of the size of 32-bit numbers
        return data
    ends = np.flatnonzero(data < 128)
    starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1] + 1))
    sizes, values = ends - starts + 1, np.zeros(ends.size, np.uint64)
    for i in range(min(int(sizes.max()), 5)):  # bits beyond 32 are dropped
        longer = np.flatnonzero(sizes > i)
        values[longer] |= (data[starts[longer] + i].astype(np.uint64) & np.uint64(127)) << np.uint64(7 * i)
    return values.astype(np.uint32).view(np.int32)
