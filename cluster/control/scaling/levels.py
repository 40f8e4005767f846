"""How busy a model is, seen at several speeds, and how far it strays: what forecasts are made of.

`Signals` are plans for the load a cold start ahead, in replicas. Each is a level (a mean over some time, or one with
its trend carried on) that rises at once and falls at its own pace, so that a burst which comes again finds room. Which
of them fits a model is not decided here: shadow.py finds out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SPANS = np.array([0.1, 0.35, 1.0, 4.0, 20.0])
"""Time constants of the means, in cold starts."""
TRENDS = ((1, 2), (2, 3))
"""Pairs of (faster, slower) mean whose difference is carried on."""
FALLS = np.array([0.0, 1.0, 4.0, 16.0, 64.0])
"""Time constants with which a plan falls, in cold starts; 0: at once."""
LEVELS = len(SPANS) + len(TRENDS)
SIGNALS = LEVELS * len(FALLS)


@dataclass(frozen=True, slots=True)
class Levels:
    """Arrays are never written after they were made. `seen_s`: how much time they cover."""

    seen_s: float
    means: Floats
    """By SPANS."""
    plans: Floats
    """By level and fall, flat."""
    stray: Floats
    """By signal: mean absolute distance of the load from what was planned a cold start before."""


def nothing() -> Levels:
    """Before the first observation."""
    return Levels(0.0, np.zeros(len(SPANS)), np.zeros(SIGNALS), np.zeros(SIGNALS))


def follow(before: Levels, load: float, passed_s: float, cold_start_s: float, planned: Floats | None) -> Levels:
    """With one more stretch of `passed_s` seconds in which the load was this.

    `planned`: the plans of a cold start ago, None while there are none so old.
    """
    # A mean over less time than its span is that over what there is.
    spans = np.minimum(SPANS * cold_start_s, before.seen_s + passed_s)
    share = -np.expm1(-passed_s / np.maximum(spans, 1e-9)) if before.seen_s else np.ones(len(SPANS))
    means = before.means + (load - before.means) * share
    trends = [2.0 * means[fast] - means[slow] for fast, slow in TRENDS]
    levels = np.maximum(np.concatenate([means, trends]), 0.0)
    kept = np.where(FALLS > 0, np.exp(-passed_s / np.maximum(FALLS * cold_start_s, 1e-9)), 0.0)
    fallen = before.plans.reshape(LEVELS, len(FALLS)) * kept
    plans = np.maximum(levels[:, None], fallen).reshape(-1)
    stray = before.stray
    if planned is not None:
        slow = -np.expm1(-passed_s / (SPANS[-1] * cold_start_s))
        off = np.abs(load - planned)
        stray = off if not stray.any() else stray + (off - stray) * slow
    return Levels(before.seen_s + passed_s, means, plans, stray)
