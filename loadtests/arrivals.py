"""Arrival times of calls, in seconds from the beginning of a run. The times are computed in advance; equal seeds give
equal times.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def poisson(count: int, rate_per_s: float, seed: int) -> list[float]:
    """Return the times of `count` arrivals of a Poisson process."""
    return gamma(count, rate_per_s, 1.0, seed)


def gamma(count: int, rate_per_s: float, cv: float, seed: int) -> list[float]:
    """Return the times of `count` arrivals. The gaps are Gamma distributed with coefficient of variation `cv`: 1 is
    Poisson, a higher value is bursty.
    """
    if rate_per_s <= 0:
        raise ValueError(f"the rate must be above 0 requests a second, got {rate_per_s:g}")
    if cv <= 0:
        raise ValueError(f"the coefficient of variation must be above 0, got {cv:g}")
    shape = 1.0 / cv**2
    gaps = np.random.default_rng(seed).gamma(shape, 1.0 / (rate_per_s * shape), size=count)
    return [float(at) for at in np.cumsum(gaps)]


def replay(times_s: Sequence[float], speed: float) -> list[float]:
    """Shift the arrival times of a trace so that the first is 0, and divide them by `speed`."""
    if speed <= 0:
        raise ValueError(f"the speed must be above 0, got {speed:g}")
    if not times_s:
        return []
    first = min(times_s)
    return [(at - first) / speed for at in times_s]
