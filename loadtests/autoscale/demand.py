"""Demand for simulations. It comes from public traces with their own arrival times, from the clients in the data set
ServeGen, or from synthetic load curves."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loadtests import traces
from loadtests.sim.scaling import Demand, Floats

TIMES = 8
"""Number of copies of each trace call. With so many copies, one hour of the trace needs about ten replicas."""
WINDOW_S = 600.0
WEEK_S = 7 * 86_400.0
CLIENTS = 43


def from_trace(name: str, times: int = TIMES, seed: int = 1, within_s: float = 1.0) -> Demand:
    """Return the demand of a trace. Each call of the trace is copied `times` times within `within_s`, so that bursts
    remain bursts."""
    calls = traces.load(name)
    rng = np.random.default_rng(seed)
    at = np.repeat([c.at_s for c in calls], times)
    if times > 1:
        at = at + rng.uniform(0.0, within_s, len(at))
    order = np.argsort(at, kind="stable")
    prompt = np.repeat([float(c.prompt_tokens) for c in calls], times)[order]
    output = np.repeat([float(c.output_tokens) for c in calls], times)[order]
    return Demand(at[order], np.ones(len(at)), prompt, np.maximum(output, 1.0), float(np.ceil(at.max())) + 1.0)


def synthetic(rate_per_s: Sequence[float], step_s: float, cv: float, lengths: tuple[float, float], seed: int) -> Demand:
    """Return a random demand. The gaps between calls are Gamma distributed. `rate_per_s`: calls per second in each
    period of `step_s` seconds. `cv`: coefficient of variation of the gaps. `lengths`: mean length of prompts and of
    outputs, in tokens; the lengths are lognormal."""
    rng = np.random.default_rng(seed)
    at = renewal(np.asarray(rate_per_s, dtype=float), step_s, np.full(len(rate_per_s), cv), rng)

    def draw(mean: float, sigma: float) -> Floats:
        drawn: Floats = np.maximum(np.exp(rng.normal(np.log(mean) - sigma**2 / 2, sigma, len(at))), 1.0)
        return drawn

    return Demand(at, np.ones(len(at)), draw(lengths[0], 0.7), draw(lengths[1], 0.9), len(rate_per_s) * step_s)


def renewal(rate: Floats, window_s: float, cv: Floats, rng: np.random.Generator) -> Floats:
    """Return the arrival times of calls. `rate` and `cv` have one value for each window of `window_s` seconds: the
    calls per second, and the coefficient of variation of the gaps between calls, which are Gamma distributed."""
    out = []
    for number, (per_s, variation) in enumerate(zip(rate, cv, strict=True)):
        count = int(per_s * window_s + rng.random())
        if count:
            gaps = rng.gamma(1.0 / variation**2, size=count + 1) if variation > 0 else np.ones(count + 1)
            times = np.cumsum(gaps)
            if times[-1] > 0:
                out.append(number * window_s + times[:-1] / times[-1] * window_s)
    return np.concatenate(out) if out else np.zeros(0)


def _counts(mean: Floats, cv: Floats, rng: np.random.Generator) -> Floats:
    """Draw the number of calls in each time interval. The numbers have the mean `mean`, and the dispersion (cv squared)
    of a renewal process with the coefficient of variation `cv`.
    """
    dispersion = np.maximum(cv**2, 0.05)
    drawn = rng.gamma(np.maximum(mean / dispersion, 1e-12)) * dispersion
    counts: Floats = np.floor(np.where(mean > 0, drawn, 0.0) + rng.random(len(mean)))
    return counts


def client_rates(number: int, folder: Path = traces.DEFAULT_FOLDER) -> tuple[Floats, Floats]:
    """Return the arrival rate and the burstiness of one client in ServeGen's data set m-small, for each window of 600
    s: calls per second, and the coefficient of variation."""
    path = traces.data_file(folder, f"servegen/m-small/chunk-{number}-trace.csv")
    rows = [line.split(",") for line in path.read_text().split()]
    return np.array([float(r[1]) for r in rows]), np.array([float(r[2]) for r in rows])


def client_lengths(number: int, folder: Path = traces.DEFAULT_FOLDER) -> tuple[Floats, Floats, Floats, Floats] | None:
    """Return the distribution of a ServeGen client's lengths in tokens: prompt lengths with their probabilities, and
    output lengths with their probabilities, as four arrays. Returns None if the data set is absent."""
    try:
        data = json.loads(traces.data_file(folder, f"servegen/m-small/chunk-{number}-dataset.json").read_text())
    except traces.NoData:
        return None
    sums: list[dict[int, float]] = [{}, {}]
    for window in data.values():
        for total, key in zip(sums, ("input_tokens", "output_tokens"), strict=True):
            for length, share in ast.literal_eval(window[key]).items():
                total[int(length)] = total.get(int(length), 0.0) + float(share)
    if not sums[0] or not sums[1]:
        return None
    arrays = []
    for total in sums:
        lengths = np.array(sorted(total), dtype=float)
        weights = np.array([total[int(v)] for v in lengths])
        arrays += [lengths, weights / weights.sum()]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def pooled_lengths(folder: Path = traces.DEFAULT_FOLDER) -> tuple[Floats, Floats, Floats, Floats]:
    """Return (prompt lengths, weights, output lengths, weights) of all clients whose data sets are present. Each client
    has the same total weight."""
    parts = [lengths for n in range(CLIENTS) if (lengths := client_lengths(n, folder)) is not None]
    out = []
    for at in (0, 2):
        out += [np.concatenate([p[at] for p in parts]), np.concatenate([p[at + 1] for p in parts]) / len(parts)]
    return out[0], out[1], out[2], out[3]


def servegen(
    clients: Sequence[int],
    seed: int,
    *,
    scale: float,
    begin_s: float = 0.0,
    duration_s: float = WEEK_S,
    bin_s: float = 1.0,
    folder: Path = traces.DEFAULT_FOLDER,
) -> Demand:
    """Return the demand of clients of ServeGen's data set m-small, at `scale` times the clients' own rates. All calls
    within an interval of `bin_s` arrive at the same time and have the mean lengths of the interval."""
    rng = np.random.default_rng(seed)
    first, last = round(begin_s / WINDOW_S), round((begin_s + duration_s) / WINDOW_S)
    bins = round(duration_s / bin_s)
    count, prompt, output = np.zeros(bins), np.zeros(bins), np.zeros(bins)
    pool = pooled_lengths(folder)
    for number in clients:
        rate, cv = client_rates(number, folder)
        each = round(WINDOW_S / bin_s)
        here = _counts(
            np.repeat(rate[first:last] * scale * bin_s, each)[:bins], np.repeat(cv[first:last], each)[:bins], rng
        )
        lengths = client_lengths(number, folder) or pool
        count += here
        for total, values, weights in ((prompt, lengths[0], lengths[1]), (output, lengths[2], lengths[3])):
            mean = float(values @ weights)
            spread = math.sqrt(max(float((values**2) @ weights) - mean**2, 0.0))
            # the sum of many lengths is drawn from a Gamma distribution with the mean and the variance of that sum
            shape = here * (mean / spread) ** 2 if spread > 0 else here
            drawn: Floats = rng.gamma(np.maximum(shape, 1e-9)) * (spread**2 / mean if spread else mean)
            total += np.where(here > 0, drawn, 0.0)
    there = count > 0
    at: Floats = ((np.arange(bins) + 0.5) * bin_s)[there].astype(float)
    return Demand(
        at,
        count[there],
        np.maximum(prompt[there] / count[there], 1.0).astype(float),
        np.maximum(output[there] / count[there], 1.0).astype(float),
        duration_s,
    )
