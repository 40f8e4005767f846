"""Bounds on the numbers that a peer reports."""

from __future__ import annotations

import math

MAX_S = 1e9
"""Upper bound on a reported number of seconds, about 30 years. Sums and prices of such numbers stay finite."""


def bounded(value: float, most: float = math.inf, otherwise: float = 0.0) -> float:
    """Return a value between 0 and `most` that is finite: `otherwise` for NaN and infinity, and else the nearest."""
    return min(max(value, 0.0), most) if math.isfinite(value) else otherwise
