"""Tests of the load-test scenario `adapters`: which adapters the calls name, and which calls are cold (their adapter
must be loaded first)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadtests.adapters.cold import ADAPTERS, cold, zipf


@given(st.lists(st.integers(0, 6), max_size=60), st.integers(1, 5))
def test_a_call_is_cold_if_others_came_between(adapters: list[int], memory: int) -> None:
    """A call is warm if and only if fewer than `memory` other adapters were called since the last call of its
    adapter."""
    for at, is_cold in enumerate(cold(adapters, memory)):
        earlier = [number for number in range(at) if adapters[number] == adapters[at]]
        assert is_cold == (not earlier or len(set(adapters[earlier[-1] + 1 : at])) >= memory)


def test_zipf_calls_the_first_most() -> None:
    """`zipf` draws only numbers of existing adapters. It draws the first adapter about twice as often as the second."""
    called = zipf(20_000, 1)
    assert set(called) <= set(range(ADAPTERS))
    assert 1.7 < called.count(0) / called.count(1) < 2.3
