"""Conversion of pooling requests, their vectors, and the properties of pooling models between cluster.api and
link.v1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster.api.pooling import MAX_DIMENSIONS, PoolingInfo, PoolingOptions, PoolingTask, pooling_tasks
from cluster.link.v1 import link_pb2 as pb

FLOAT_BYTES = 4
MAX_SHORTER_DIMENSIONS = 1024
"""Maximum number of shorter vector lengths that a model can declare."""


def pooling_to_pb(params: PoolingOptions) -> pb.Pooling:
    """Encode the parameters of a pooling request."""
    return pb.Pooling(task=params.task.value, dimensions=params.dimensions, second_text_at=params.second_text_at)


def pooling_from_pb(m: pb.Pooling) -> PoolingOptions:
    """Decode the parameters of a pooling request, the inverse of `pooling_to_pb`. Raises ValueError for an unknown
    task."""
    return PoolingOptions(PoolingTask(m.task), m.dimensions if m.HasField("dimensions") else None, m.second_text_at)


def pooler_to_pb(info: PoolingInfo) -> pb.Pooler:
    """Encode the properties of a pooling model. Its tasks are left out, because the worker's capabilities contain
    them."""
    return pb.Pooler(
        dimensions=info.dimensions, shorter_dimensions=info.shorter_dimensions, any_shorter=info.any_shorter
    )


def pooler_from_pb(m: pb.Pooler, capabilities: Iterable[str]) -> PoolingInfo:
    """Decode the properties of a pooling model. Its tasks are taken from the worker's `capabilities`; tasks that this
    release does not know are left out. Raises ValueError if a length of vectors is out of range."""
    if not 1 <= m.dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"pooler.dimensions is {m.dimensions}, but must be 1 to {MAX_DIMENSIONS}")
    shorter = tuple(m.shorter_dimensions)
    if len(shorter) > MAX_SHORTER_DIMENSIONS or any(not 1 <= length <= m.dimensions for length in shorter):
        raise ValueError(
            f"pooler.shorter_dimensions: must be at most {MAX_SHORTER_DIMENSIONS} lengths of 1 to {m.dimensions}"
        )
    return PoolingInfo(pooling_tasks(capabilities), m.dimensions, shorter, m.any_shorter)


def vectors_by_slot(vectors: Sequence[pb.SlotVector]) -> Mapping[int, bytes]:
    """Return the vectors by slot. Slots without a vector are left out. Raises ValueError for a vector that is empty,
    longer than MAX_DIMENSIONS, or not a whole number of float32 values."""
    out: dict[int, bytes] = {}
    for vector in vectors:
        size = len(vector.values)
        if not size or size % FLOAT_BYTES or size > FLOAT_BYTES * MAX_DIMENSIONS:
            raise ValueError(
                f"vectors: slot {vector.slot} has {size} bytes, but a vector has 1 to {MAX_DIMENSIONS} float32 values"
            )
        out[vector.slot] = vector.values
    return out
