"""JSON text of float32 values: the shortest decimal number that is the same float32 again.

Problem: Python writes a float32 as the float64 that it equals, in up to 17 digits, and numpy writes the shortest text
of one value at a time, in a microsecond. An answer may have millions of values.

Method: of each value, the decimal number of 6, 7, 8 or 9 digits next to it is computed for the whole array, until that
number is the same float32. The nearest float64 of such a short number has that short number as its shortest text, so an
ordinary JSON encoder writes it. Powers of ten up to 10**22 are exact, so the division
by one gives that float64. Values that need others are written by numpy.

Not imported at the start: deferred_imports.py.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

FEWEST_DIGITS, MOST_DIGITS = 6, 9
"""Six digits are always kept by a float32, and nine always suffice."""
_EXACT_POWER: Final = 22
"""Powers of ten up to this one are exact float64 numbers."""
LEAST_EXPONENT, MOST_EXPONENT = MOST_DIGITS - 1 - _EXACT_POWER, _EXACT_POWER + FEWEST_DIGITS - 1
"""Decimal exponents of the values for which an exact power of ten moves each number of digits before the point."""
_POWERS: Final = 10.0 ** np.arange(_EXACT_POWER + 1)


def short_floats(values: bytes | memoryview | np.ndarray[Any, Any]) -> list[float]:
    """Return floats whose shortest texts are those of little-endian float32 values, which must be finite."""
    numbers: list[float] = _shortest(np.frombuffer(values, "<f4")).tolist()
    return numbers


def _shortest(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return for each float32 the float64 with the shortest text that is the same float32."""
    out = numbers.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        exponents = np.floor(np.log10(np.abs(out)))
        near = (exponents >= LEAST_EXPONENT) & (exponents <= MOST_EXPONENT)
        todo = np.flatnonzero(near)
        value, single, powers = out[todo], numbers[todo], -exponents[todo].astype(np.int64)
        for digits in range(FEWEST_DIGITS, MOST_DIGITS + 1):
            power = powers + (digits - 1)
            scale = _POWERS[np.abs(power)]
            up = power >= 0
            if up.all():
                rounded = np.rint(value * scale) / scale
            else:
                rounded = np.where(up, np.rint(value * scale) / scale, np.rint(value / scale) * scale)
            same = rounded.astype(np.float32) == single
            out[todo[same]] = rounded[same]
            left = ~same
            todo, value, single, powers = todo[left], value[left], single[left], powers[left]
    for at in np.flatnonzero(~near & (out != 0)):
        out[at] = float(str(numbers[at]))
    return out
