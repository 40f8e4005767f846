"""How busy a model is, seen at several speeds, and how far it strays: what forecasts are made of.

A level is a guess of the load a cold start ahead, in replicas: means over several times, means with their trend
carried on, and a mixture of means whose weights are learnt by least squares from what the load became (recursive, with
a ridge, so that it begins as the mean over one cold start). A signal is a level that rises at once and falls at a pace
of its own, so that a burst which comes again finds room. Which signal fits a model is not decided here: backtest.py
finds out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SPANS = np.array([0.1, 0.33, 1.0, 2.0, 5.0, 20.0])
"""Time constants of the means, in cold starts."""
TRENDS = ((2, 3, 1.0), (2, 3, 2.0))
"""(faster, slower, how far): the difference of two means is carried on."""
FALLS = np.array([0.0, 4.0, 16.0, 64.0])
"""Time constants with which a signal falls, in cold starts; 0: at once."""
LEVELS = len(SPANS) + len(TRENDS) + 1
SIGNALS = LEVELS * len(FALLS)
RIDGE = 30.0
"""Observations' worth of trust in the mean over one cold start."""
FORGET = 200.0
"""Cold starts after which the mixture's past counts for 1/e."""


@dataclass(frozen=True, slots=True)
class DemandLevels:
    """Arrays are never written after they were made. `seen_s`: how much time they cover."""

    seen_s: float
    means: Floats
    """By SPANS."""
    signals: Floats
    """By level and fall, flat."""
    stray: Floats
    """By signal: mean absolute distance of the load from what was guessed a cold start before."""
    weights: Floats
    """Of the mixture, by SPANS and a constant."""
    spread: Floats
    """The mixture's inverse of X'X."""


def nothing() -> DemandLevels:
    """Before the first observation."""
    count = len(SPANS)
    return DemandLevels(
        0.0,
        np.zeros(count),
        np.zeros(SIGNALS),
        np.zeros(SIGNALS),
        np.where(np.arange(count) == 2, 1.0, 0.0),
        np.eye(count) / RIDGE,
    )


def follow(
    before: DemandLevels, load: float, passed_s: float, cold_start_s: float, past: tuple[Floats, Floats] | None
) -> DemandLevels:
    """With one more stretch of `passed_s` seconds in which the load was this.

    `past`: means and signals of a cold start ago; None while there are none so old.
    """
    # A mean over less time than its span is that over what there is.
    spans = np.minimum(SPANS * cold_start_s, before.seen_s + passed_s)
    share = -np.expm1(-passed_s / spans) if before.seen_s else np.ones(len(SPANS))
    means = before.means + (load - before.means) * share
    weights, spread, stray = before.weights, before.spread, before.stray
    if past is not None:
        weights, spread = _regress(before, past[0], float(means[1]), passed_s / cold_start_s)
        slow = max(passed_s / (before.seen_s + passed_s), -np.expm1(-passed_s / (SPANS[-1] * cold_start_s)))
        stray = stray + (np.abs(means[1] - past[1]) - stray) * slow
    trends = [means[fast] + far * (means[fast] - means[slow]) for fast, slow, far in TRENDS]
    levels = np.maximum(np.concatenate([means, trends, [weights @ means]]), 0.0)
    kept = np.where(FALLS > 0, np.exp(-passed_s / np.maximum(FALLS * cold_start_s, 1e-9)), 0.0)
    fallen = before.signals.reshape(LEVELS, len(FALLS)) * kept
    signals = np.maximum(levels[:, None], fallen).reshape(-1)
    return DemandLevels(before.seen_s + passed_s, means, signals, stray, weights, spread)


def _regress(before: DemandLevels, x: Floats, became: float, passed: float) -> tuple[Floats, Floats]:
    """One step of recursive least squares, relative to the load's size so that its scale does not matter."""
    size = max(float(x.max()), became)
    if size <= 0:
        return before.weights, before.spread
    x, became = x / size, became / size
    keep = float(np.exp(-passed / FORGET))
    gain = before.spread @ x
    gain = gain / (keep + x @ gain)
    weights = before.weights + gain * (became - x @ before.weights)
    spread = (before.spread - np.outer(gain, x @ before.spread)) / keep
    # What is not excited must not grow without bound.
    spread = (spread + spread.T) / 2
    top = float(np.trace(spread))
    if top > len(x) / RIDGE * 4:
        spread = spread * (len(x) / RIDGE * 4 / top)
    return weights, spread
