"""JSON text of float32 values: the shortest decimal number that reads back as the same float32.

Python converts a float32 to a float64 and writes up to 17 digits. orjson reads the float32 values of a numpy array and
writes the shortest text of each, in 20 ns per value.

The gateway imports this module only after its start, because importing numpy and orjson is slow (deferred_imports.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson


def floats_json(values: bytes | memoryview | np.ndarray[Any, Any]) -> bytes:
    """Return little-endian float32 values as a JSON array with the shortest text of each value. The values must be
    finite."""
    return orjson.dumps(np.frombuffer(values, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)


def short_floats(values: bytes | memoryview | np.ndarray[Any, Any]) -> list[float]:
    """Return little-endian float32 values as Python floats with few digits: the JSON text of each float is the shortest
    text of the float32 value. The values must be finite."""
    numbers: list[float] = orjson.loads(floats_json(values))
    return numbers
