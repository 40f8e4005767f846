"""Load of a model at several time scales, and the typical deviation of the load: the inputs of forecasts.

A level is an estimate of what the load will be one cold start later, in replicas. Some levels are means
of the load over time spans of different lengths. Others extrapolate the trend of these means. One level
is a mixture of the means. Recursive least squares learn the weights of the mixture, from how well earlier
estimates fitted the load. Because of a ridge prior, the mixture starts as the mean over one cold start.

A signal is made from a level. It follows a rising level at once and a falling level slowly, so that a
recurring burst finds capacity. backtest.py selects the signals that fit a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SPANS = np.array([0.1, 0.33, 1.0, 2.0, 5.0, 20.0])
"""Time constants of the means, in cold starts."""
TRENDS = ((2, 3, 1.0), (2, 3, 2.0))
"""Triples of (index of a faster mean, index of a slower mean, factor). Level: faster + factor * (faster - slower)."""
FALLS = np.array([0.0, 4.0, 16.0, 64.0])
"""Time constants of the fall of a signal, in cold starts; 0 means that the signal falls at once."""
LEVELS = len(SPANS) + len(TRENDS) + 1
SIGNALS = LEVELS * len(FALLS)
RIDGE = 30.0
"""Weight of the prior, in observations. The prior is the mean over one cold start."""
FORGET = 200.0
"""Number of cold starts after which the weight of past observations in the mixture has fallen to 1/e."""


@dataclass(frozen=True, slots=True)
class DemandLevels:
    """State of the forecasts of one model. Its arrays are never changed in place. `seen_s`: seconds of demand observed
    so far."""

    seen_s: float
    means: Floats
    """Mean loads, one for each of SPANS."""
    signals: Floats
    """Signals as a flat array, by level and then by time constant of the fall."""
    stray: Floats
    """Mean absolute error of each signal as a forecast of the load one cold start later."""
    weights: Floats
    """Weights of the mixture, one for each of SPANS."""
    spread: Floats
    """Inverse of the matrix X'X in the regression of the mixture."""


def empty() -> DemandLevels:
    """Return the state before the first observation."""
    count = len(SPANS)
    return DemandLevels(
        0.0,
        np.zeros(count),
        np.zeros(SIGNALS),
        np.zeros(SIGNALS),
        np.where(np.arange(count) == 2, 1.0, 0.0),
        np.eye(count) / RIDGE,
    )


def update(
    before: DemandLevels, load: float, passed_s: float, cold_start_s: float, past: tuple[Floats, Floats] | None
) -> DemandLevels:
    """Return the state of the forecast after `passed_s` more seconds, in which the demand was `load`.

    `before`: the state before. `past`: `means` and `signals` of the state one cold start ago; None while less time than
    a cold start was observed.
    """
    # While less time than the span of a mean has been observed, the mean covers the observed time.
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
    """Run one step of recursive least squares. Returns the new weights and the new inverse matrix.

    `x`: the mean loads at the time that lies one cold start back. `became`: the load now, which the mean loads should
    have predicted. All loads are divided by the largest of them, so their scale does not matter. `passed`: time since
    the last step; the unit is the duration of a cold start.
    """
    size = max(float(x.max()), became)
    if size <= 0:
        return before.weights, before.spread
    x, became = x / size, became / size
    keep = float(np.exp(-passed / FORGET))
    gain = before.spread @ x
    gain = gain / (keep + x @ gain)
    weights = before.weights + gain * (became - x @ before.weights)
    spread = (before.spread - np.outer(gain, x @ before.spread)) / keep
    # The variance in directions without data must not grow without bound.
    spread = (spread + spread.T) / 2
    top = float(np.trace(spread))
    if top > len(x) / RIDGE * 4:
        spread = spread * (len(x) / RIDGE * 4 / top)
    return weights, spread
