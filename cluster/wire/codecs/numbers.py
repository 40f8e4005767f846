"""Bounds on the numbers in messages of workers."""

from __future__ import annotations

import math

MAX_TOTAL_S = 1e9
"""Largest number of seconds, about 30 years, that the total time of an engine or a request may have. Sums and prices of
such numbers stay finite."""


def bounded(value: float, most: float = math.inf, otherwise: float = 0.0) -> float:
    """Return the number between 0 and `most` that is nearest to `value`; `otherwise` if `value` is NaN or infinite."""
    return min(max(value, 0.0), most) if math.isfinite(value) else otherwise
