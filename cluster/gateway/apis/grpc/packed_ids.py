"""Token ids of serialized protobuf messages, read from their bytes into arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.gateway.apis.grpc.message_scan import read_varint

Ids = np.ndarray[Any, np.dtype[Any]]
"""Whole numbers, of the fewest bytes that hold them."""


def packed_ids(data: bytes | bytearray, number: int) -> Ids | None:
    """The 32-bit numbers of a packed field at the top of a well-formed message; None where it is not packed. Half as
    long as protobuf's own list takes."""
    at, found = 0, []
    while at < len(data):
        tag, at = read_varint(data, at)
        wire = tag & 7
        if wire == 2:
            length, at = read_varint(data, at)
            if tag >> 3 == number:
                found.append(data[at : at + length])
            at += length
        elif wire == 0 and tag >> 3 != number:
            at = read_varint(data, at)[1]
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            return None
    return _decoded(np.frombuffer(b"".join(found), np.uint8))


def _decoded(data: np.ndarray[Any, np.dtype[np.uint8]]) -> Ids:
    """Varints, cut to 32 bits as protobuf cuts them."""
    if not data.size or data.max() < 128:  # as they are: four times as much would go to another process
        return data
    ends = np.flatnonzero(data < 128)
    starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1] + 1))
    sizes, values = ends - starts + 1, np.zeros(ends.size, np.uint64)
    for i in range(min(int(sizes.max()), 5)):  # what is beyond 32 bits is cut off
        more = np.flatnonzero(sizes > i)
        values[more] |= (data[starts[more] + i].astype(np.uint64) & np.uint64(127)) << np.uint64(7 * i)
    return values.astype(np.uint32).view(np.int32)
