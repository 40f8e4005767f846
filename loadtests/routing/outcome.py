"""Measurements of one simulation, and a function that runs several simulations in parallel processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from loadtests.routing.calls import RoutedCall
from loadtests.routing.cluster import Cluster

T = TypeVar("T")
QUANTILES = tuple(range(0, 101, 2))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Measurements of a simulation. Tokens are sums over all calls, times are in seconds.

    `cached`: prompt tokens that engines found in their caches. `pooled` and `in_pool`: prompt tokens that would
    have been found if all workers had one common cache; RoutedCall explains the two kinds of common cache.
    `exact`: share of the calls for which the gateway predicted the cached tokens exactly. `load`: prompt tokens
    that each worker computed. `quantiles_s`: the QUANTILES of the times to first token.
    """

    label: str
    calls: int
    prompt_tokens: int
    cached: int
    pooled: int
    in_pool: int
    mean_s: float
    p90_s: float
    p99_s: float
    exact: float
    load: tuple[int, ...]
    quantiles_s: tuple[float, ...]
    hedged: int = 0

    @property
    def hits(self) -> float:
        """Number of cached tokens divided by `pooled`, the number that one cache of all workers would have had."""
        return self.cached / max(self.pooled, 1)

    @property
    def hits_alike(self) -> float:
        """Number of prompt tokens that were cached on the workers, divided by `in_pool`: the number of prompt tokens
        that would have been cached in one cache as large as the caches of all workers together."""
        return self.cached / max(self.in_pool, 1)

    @property
    def hit_rate(self) -> float:
        """Cached tokens as a share of all prompt tokens."""
        return self.cached / max(self.prompt_tokens, 1)

    @property
    def variation(self) -> float:
        """Coefficient of variation of the workers' load."""
        return variation(self.load)

    def as_json(self) -> dict[str, Any]:
        """Return the measurements as plain values, without the quantiles."""
        values = asdict(self) | {
            "hits": self.hits,
            "hits_alike": self.hits_alike,
            "hit_rate": self.hit_rate,
            "variation": self.variation,
        }
        del values["quantiles_s"]
        return values


def variation(values: Sequence[float]) -> float:
    """Return the coefficient of variation; 0 if all values are 0."""
    mean = float(np.mean(values))
    return float(np.std(values)) / mean if mean else 0.0


def measured(label: str, cluster: Cluster, calls: Sequence[RoutedCall] | None = None) -> Outcome:
    """Return the measurements of a finished simulation. `calls`: the calls to include, None for all. Raises
    RuntimeError if one of these calls has not ended."""
    chosen = cluster.calls if calls is None else calls
    if open_calls := sum(call.ended < 0 for call in chosen):
        raise RuntimeError(f"{label}: {open_calls} of {len(chosen)} calls have not ended")
    times = np.array([call.ttft_s for call in chosen])
    return Outcome(
        label=label,
        calls=len(chosen),
        prompt_tokens=sum(call.prompt.prompt_tokens for call in chosen),
        cached=sum(call.cached for call in chosen),
        pooled=sum(call.pooled for call in chosen),
        in_pool=sum(call.in_pool for call in chosen),
        mean_s=float(times.mean()),
        p90_s=float(np.percentile(times, 90)),
        p99_s=float(np.percentile(times, 99)),
        exact=sum(call.predicted == call.cached for call in chosen) / len(chosen),
        load=tuple(worker.computed for worker in cluster.workers),
        quantiles_s=tuple(float(value) for value in np.percentile(times, QUANTILES)),
        hedged=sum(call.was_hedged for call in chosen),
    )


async def run_all(jobs: Sequence[tuple[Callable[..., T], tuple[Any, ...]]]) -> list[T]:
    """Run functions in processes, as many at once as there are cores, and return their results in order."""
    loop = asyncio.get_running_loop()
    cores = max(min(len(os.sched_getaffinity(0)), 8, len(jobs)), 1)
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(await asyncio.gather(*(loop.run_in_executor(pool, job, *arguments) for job, arguments in jobs)))


def curves(outcomes: Sequence[Outcome]) -> dict[str, list[float]]:
    """Return the times to first token in ms for plots.py, by label."""
    return {outcome.label: [1000 * value for value in outcome.quantiles_s] for outcome in outcomes}
