"""Which divisions of a model among GPUs fit, and how many GPUs a load needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.capacity.cache_size import CacheSize
from cluster.policy.capacity.fit import Engine, Shape, best, divisions, fit, replicas
from cluster.policy.capacity.gpus import GIB, Gpu, gpu

LLAMA_70B = Shape(141_107_412_992, CacheSize(327_680, heads=8), 80, 64, 8192, 28672, 128256)
H100 = Gpu("H100", int(79.1 * GIB))


@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]), st.integers(1, 131_072), st.integers(1, 1000))
def test_more_memory_and_more_ranks_never_hold_less(gib: int, tp: int, context: int, concurrency: int) -> None:
    """With more memory, or with more ranks, at least as many calls fit. What fits by the estimate fits surely."""
    one = fit(LLAMA_70B, Gpu("any", gib * GIB), Engine(tp, step_tokens=2048, sequences=256), context)
    larger = fit(LLAMA_70B, Gpu("any", (gib + 1) * GIB), one.engine, context)
    wider = fit(LLAMA_70B, one.gpu, replace(one.engine, tp=2 * tp), context)
    assert larger.calls >= one.calls
    assert tp == 8 or wider.calls >= one.calls
    assert (one.lacking == 0) == (one.calls >= 1)
    assert one.surely_lacking <= one.lacking
    if one.calls >= 1:
        count = replicas(one, concurrency)
        assert count * min(int(one.calls), 256) >= concurrency > (count - 1) * min(int(one.calls), 256)


def test_the_fewest_gpus_are_chosen() -> None:
    """70B in 16 bits does not fit on one H100. For one call two H100s are enough, for many calls four or eight."""
    plans = [fit(LLAMA_70B, H100, Engine(tp, pp), 8192) for tp, pp in divisions(LLAMA_70B, 8)]
    assert plans[0].gpus == 1
    assert plans[0].lacking > 60 * GIB
    assert (one := best(plans, 1)) is not None
    assert one.gpus == 2
    assert (many := best(plans, 64)) is not None
    assert many.gpus == 4
    assert best(plans[:1], 1) is None


def test_divisions_are_those_that_vllm_accepts() -> None:
    """Tensor parallelism divides the heads and stays within a node; stages come with the widest group only."""
    shape = replace(LLAMA_70B, heads=9, cache=CacheSize(1, heads=3), layers=4)
    assert list(divisions(shape, 16, 8)) == [(1, 1), (3, 1), (3, 2), (3, 3), (3, 4)]


@pytest.mark.parametrize(
    ("name", "gib"),
    [("H100", 79.1), ("h100", 79.1), ("NVIDIA H100", 79.1), ("A100-40G", 39.4), ("24GiB", 24.0), ("80 GB", 80.0)],
)
def test_gpus_by_name_and_by_size(name: str, gib: float) -> None:
    """A GPU is found by Ray's name or by its size."""
    found = gpu(name)
    assert found is not None
    assert found.memory == int(gib * GIB)


def test_an_unknown_gpu() -> None:
    """An unknown type has no memory."""
    assert gpu("H1000") is None
