"""Golden check (golden_check.py) of a pooling model: the parameters of the golden request, and the comparison of a
vector with the reference vector."""

from __future__ import annotations

import math
import sys
from array import array

from cluster.api.pooling import PoolingOptions, PoolingTask
from cluster.api.types import EngineInfo

TOLERANCES = {"float32": 0.01, "sim": 0.01}
"""Tolerance of the distance between two vectors, relative to the reference's length, by the first part of the engine
class. A score, which may be near 0, is compared absolutely."""
TOLERANCE_16_BIT = 0.2


def golden_pooling(info: EngineInfo) -> PoolingOptions | None:
    """Return the pooling parameters of the golden request; None for an engine that generates tokens.

    Raises ValueError for a pooling model without a task.
    """
    if info.pooling is None:
        return None
    if not info.pooling.tasks:
        raise ValueError("the pooling model has no task")
    return PoolingOptions(info.pooling.tasks[0])


def why_vector_wrong(reference: bytes, vector: bytes, info: EngineInfo) -> str:
    """Return the reason why a vector is wrong; empty if nothing proves that it is wrong.

    `reference`, `vector`: little-endian float32 values.
    """
    expected, actual = floats(reference), floats(vector)
    length = info.pooling.dimensions if info.pooling is not None else len(expected)
    if len(actual) != length or not actual:
        return f"a vector of {len(actual)} numbers, and the model's settings promise {length}"
    if not all(map(math.isfinite, actual)):
        return "a vector with NaN or infinite numbers"
    distance = math.dist(expected, actual)
    if info.pooling is not None and info.pooling.tasks[0] is not PoolingTask.SCORE:
        distance /= max(math.hypot(*expected), sys.float_info.min)
    tolerance = TOLERANCES.get(info.engine_class.split("-")[0], TOLERANCE_16_BIT)
    return f"a vector at the distance {distance:.3f} from the first one" if distance > tolerance else ""


def floats(vector: bytes) -> array[float]:
    """Decode a vector of little-endian float32 values."""
    values = array("f")
    values.frombytes(vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values
