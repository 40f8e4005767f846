"""JSON text of float32 values: the shortest decimal number that reads back as the same float32.

Python writes a float32 as the float64 that it equals, in up to 17 digits. orjson writes the short text of a numpy
array's values at 20 ns each.

Not imported at the start: deferred_imports.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson


def floats_json(values: bytes | memoryview | np.ndarray[Any, Any]) -> bytes:
    """Return little-endian float32 values, which must be finite, as a JSON array of their shortest texts."""
    return orjson.dumps(np.frombuffer(values, "<f4"), option=orjson.OPT_SERIALIZE_NUMPY)


def short_floats(values: bytes | memoryview | np.ndarray[Any, Any]) -> list[float]:
    """Return little-endian float32 values, which must be finite, as floats with the same short text in JSON."""
    numbers: list[float] = orjson.loads(floats_json(values))
    return numbers
