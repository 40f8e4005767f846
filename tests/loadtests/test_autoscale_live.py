"""The parts of the live run that need no Ray: its calls, and how its answers are compared."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.autoscale_live.calls import Told, compare
from loadtests.autoscale_live.choice import choice
from loadtests.autoscale_live.traffic import Engine, PlannedCall, plan, share_of_most


@given(st.integers(0, 99), st.floats(30, 300))
def test_equal_seeds_give_equal_calls(seed: int, seconds: float) -> None:
    """In order, within the time, of both faces, and as long as streams are to be."""
    engine = Engine()
    calls = plan(seed, seconds, engine, 4)
    assert calls == plan(seed, seconds, engine, 4)
    assert [one.at_s for one in calls] == sorted(one.at_s for one in calls)
    assert all(0 <= one.at_s < seconds for one in calls)
    assert all(
        one.tokens * engine.decode_s + engine.decode_s >= 5 and one.tokens * engine.decode_s <= 60 for one in calls
    )
    assert abs(sum(one.face for one in calls) - len(calls) / 2) <= 1


def test_the_most_is_seventy_percent_of_all_replicas() -> None:
    """Over many seeds, the work that comes is the share of the most that the curve says."""
    engine, seconds, seeds = Engine(), 200.0, range(200)
    work = sum(one.tokens for seed in seeds for one in plan(seed, seconds, engine, 4)) / len(seeds)
    mean_share = sum(share_of_most(i / 1000) for i in range(1000)) / 1000
    assert work == pytest.approx(0.7 * 4 * engine.tokens_per_s * seconds * mean_share, rel=0.03)
    assert max(share_of_most(i / 1000) for i in range(1001)) == 1.0
    assert math.isclose(share_of_most(0.75), 0.08)


def test_answers_of_one_prompt_begin_alike() -> None:
    """A shorter one is the beginning of a longer; what is not is told, what failed already stays so."""
    texts = [(0, "abc", ""), (0, "abcdef", ""), (0, "abx", ""), (1, "zz", ""), (0, "q", "cut")]
    calls = [Told(PlannedCall(0, 1, 0, number), "sdk", text=text, fault=fault) for number, text, fault in texts]
    compare(calls)
    assert [one.fault for one in calls] == ["", "", "other text than its like", "", "cut"]


@pytest.mark.parametrize("use", [0.1, 0.6])
def test_choosing_a_replica_saves_less_than_a_stream(use: float) -> None:
    """Calls go to the replica with the fewest, so that all have about as many; who stays for ever moves nothing."""
    found = choice(use, 20.0, 1.0, random.Random(2))
    assert 0 <= found.blind - found.fewest < 1.0
    assert 0 <= found.blind_moved - found.fewest_moved < 1.0
    assert found.blind_moved <= found.blind
    assert found.blind == pytest.approx(use * 16, rel=0.1), "as many as the places that are taken"
    assert choice(use, 20.0, 1e9, random.Random(2)).blind_moved == 0
