"""The history: values at their time steps, bounded memory, and sums over gateways."""

from __future__ import annotations

import gc
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.console.history import history
from cluster.gateway.console.history.history import (
    BUCKETS,
    COUNTS,
    MODEL_COLUMNS,
    STEPS,
    TENANT_COLUMNS,
    History,
    Table,
)
from cluster.gateway.console.overview.overview import quantile
from tests.support.cpu import Steps, slowness

NO_COUNTS = [0.0] * BUCKETS


def model_values(tokens: float, **columns: float) -> list[float]:
    """Return the values of a model at one step."""
    return [tokens if name == "tokens" else columns.get(name, 0.0) for name in MODEL_COLUMNS]


def test_an_hour_of_a_large_cluster_fits_in_32_mib() -> None:
    """The history of 1,000 tenants and 100 models takes at most 32 MiB with all its objects, even after other tenants
    have replaced all of the tenants. Its arrays take at most the 30 MiB that the module states."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = History()
        for step in range(0, 2 * STEPS, 120):
            for number in range(1000):
                kept.tenants.put(f"tenant-{number}", step, [1.0] * len(TENANT_COLUMNS))
            for number in range(100):
                kept.models.put(f"model-{number}", step, model_values(1.0))
        for number in range(1000):
            kept.tenants.put(f"other-{number}", 2 * STEPS, [1.0] * len(TENANT_COLUMNS))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(kept.tenants) == 1000
    assert len(kept.models) == 100
    assert kept.nbytes <= 30 << 20
    assert used <= 32 << 20


def test_a_small_cluster_takes_little() -> None:
    """The history of one model and one tenant takes less than 2 MiB of memory."""
    kept = History()
    kept.models.put("m", 1, model_values(1.0))
    kept.tenants.put("t", 1, [1.0] * len(TENANT_COLUMNS))
    assert kept.nbytes < 2 << 20


def test_values_lie_at_their_steps() -> None:
    """The value of a step without a sample is NaN. So are the values of steps before the first sample and after the
    last. Values older than an hour are overwritten."""
    table = Table(("a", "b"), 4)
    table.put("k", 10, (1.0, 2.0))
    table.put("k", 13, (3.0, 4.0))
    values = table.read("k", ("b", "a"), 9, 14)
    assert np.array_equal(values[0], [np.nan, 2.0, np.nan, np.nan, 4.0, np.nan], equal_nan=True)
    assert np.array_equal(values[1], [np.nan, 1.0, np.nan, np.nan, 3.0, np.nan], equal_nan=True)
    table.put("k", 10 + STEPS, (5.0, 6.0))
    values = table.read("k", ("a",), 10, 10 + STEPS)[0]
    assert np.isnan(values[0])
    assert (values[3], values[-1]) == (3.0, 5.0)
    table.put("k", 12, (9.0, 9.0))
    assert 9.0 not in table.read("k", ("a",), 10, 10 + STEPS)
    assert np.isnan(table.read("nobody", ("a",), 1, 3)).all()


def test_a_key_that_returns_after_hours_has_no_old_values() -> None:
    """If a key of the history gets no values for a time, the steps in between have no values. This holds even if more
    than an hour was skipped, which is the length of the history."""
    table = Table(("a",), 4)
    for step in range(10):
        table.put("k", step, (1.0,))
    table.put("k", 5 * STEPS, (2.0,))
    values = table.read("k", ("a",), 4 * STEPS + 1, 5 * STEPS)[0]
    assert np.nansum(values) == 2.0


def test_the_key_with_the_oldest_value_gives_way() -> None:
    """If a table of the history has too many keys, it forgets the key whose last value is oldest. The new key does not
    get values of the forgotten key."""
    table = Table(("a",), 2)
    table.put("old", 1, (1.0,))
    table.put("new", 2, (2.0,))
    table.put("newest", 3, (3.0,))
    assert len(table) == 2
    assert np.isnan(table.read("old", ("a",), 1, 3)).all()
    assert np.array_equal(table.read("newest", ("a",), 1, 3)[0], [np.nan, np.nan, 3.0], equal_nan=True)
    table.forget_older(2 + STEPS)
    assert len(table) == 1


async def test_gateways_add_up() -> None:
    """The history of a cluster is computed from the histories of its gateways.

    Rates are added. For the number of replicas, the largest value is used, since each gateway reports the number of the
    whole cluster. Percentiles are computed from the added counts.
    """
    first, second = History(), History()
    slow, fast = list(NO_COUNTS), list(NO_COUNTS)
    fast[3], slow[12] = 99.0, 1.0
    first.models.put("m", 5, [*model_values(10.0, wanted=3.0)[:-BUCKETS], *fast])
    second.models.put("m", 5, [*model_values(5.0, wanted=3.0)[:-BUCKETS], *slow])
    second.models.put("m", 6, model_values(7.0))
    names = ["tokens", "replicas_wanted", "ttft_p50", "ttft_p99", "cache_hits", "fairness_gap"]
    columns = history.columns_of(names)
    parts = [await each.columns(columns, "m", "", 4, 6) for each in (first, second)]
    series = history.compute(names, await history.add_columns(parts, 3), 3)
    assert series["tokens"] == [None, 15.0, 7.0]
    assert series["replicas_wanted"] == [None, 3.0, 0.0]
    assert series["ttft_p50"][1] == pytest.approx(0.015, abs=0.006)
    assert series["ttft_p99"] == [None, pytest.approx(0.02), None]
    assert series["cache_hits"] == [None, None, None]
    first.models.put("n", 5, model_values(1.0, wanted=9.0))
    whole = await first.columns(columns, "", "", 5, 5)
    assert (whole["tokens"], whole["wanted"]) == ([11.0], [9.0])


async def test_a_tenant_has_no_series_of_models() -> None:
    """A series that is not recorded for tenants is null."""
    kept = History()
    kept.tenants.put("t", 5, [4.0] * len(TENANT_COLUMNS))
    names = ["tokens", "ttft_p99", "replicas_had"]
    columns = await kept.columns(history.columns_of(names), "", "t", 4, 5)
    series = history.compute(names, await history.add_columns([columns], 2), 2)
    assert series == {"tokens": [None, 4.0], "ttft_p99": [None, None], "replicas_had": [None, None]}


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 20), min_size=BUCKETS, max_size=BUCKETS), min_size=1, max_size=5))
def test_percentiles_of_steps_are_those_of_the_overview(steps: list[list[int]]) -> None:
    """The history computes the same percentiles as the overview from the same counts."""
    counts = np.array(steps, np.float32).T
    for part in (0.5, 0.99):
        found = history.quantiles(counts, part)
        for value, each in zip(found.tolist(), steps, strict=True):
            wanted = quantile(each, part)
            assert value == pytest.approx(wanted, rel=1e-4, abs=1e-4) if wanted is not None else np.isnan(value)


async def test_the_plots_of_a_large_cluster_block_shortly() -> None:
    """Adding up the history of 100 models over an hour, with percentiles, never blocks the event loop for 10 ms."""
    kept, names = History(), list(history.SERIES)
    for step in range(STEPS):
        for number in range(0, 100, 10):
            kept.models.put(f"model-{number + step % 10}", step, model_values(1.0))
    longest_s, limit = 0.0, slowness()
    for work in (
        kept.columns(history.columns_of(names), "", "", 0, STEPS - 1),
        history.add_columns([{name: [1.0] * STEPS for name in COUNTS}] * 8, STEPS),
    ):
        steps = Steps(work)
        await steps
        longest_s = max(longest_s, steps.longest_s)
    began_s = time.thread_time()
    history.compute(names, {name: np.ones(STEPS, np.float32) for name in MODEL_COLUMNS}, STEPS)
    longest_s = max(longest_s, time.thread_time() - began_s)
    print(f"longest step {longest_s * 1000:.2f} ms")
    assert longest_s < 0.010 * max(limit, slowness())
