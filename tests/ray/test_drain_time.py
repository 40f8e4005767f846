"""Tests of how the drain time of a node is divided: a part for running calls, and the rest for ending the node's
processes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.ray.drain_time import ray_timeout_s, usable_s


@given(st.floats(0, 10_000))
def test_calls_have_the_time_that_is_configured(drain_timeout_s: float) -> None:
    """Ray's own drain timeout is long enough that running calls get at least the configured drain timeout."""
    assert usable_s(ray_timeout_s(drain_timeout_s)) >= drain_timeout_s - 1e-6


@given(st.floats(0, 10_000))
def test_something_is_left_for_the_end(left_s: float) -> None:
    """The time that calls get to finish is at least a quarter of the time left until the deadline, and always less than
    all of it."""
    assert left_s / 4 <= usable_s(left_s) <= left_s
    assert left_s == 0 or usable_s(left_s) < left_s
