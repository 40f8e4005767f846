"""Tests of the learned prefill times. A worker's slowdown is its time for a prompt relative to a usual worker's."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cluster.policy.routing.prefill_times import FASTEST, MEMORY_S, SLOWEST, PrefillTimes

samples = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 200_000), st.floats(1e-4, 1e3), st.floats(0, 100), st.booleans()),
    max_size=60,
)


def served(slowdowns: dict[str, float], seed: int, count: int, times: PrefillTimes, now: float = 0.0) -> float:
    """Record `count` prompts of each worker. A prompt takes 10 ms plus 0.1 ms per token, and this sum is multiplied by
    the worker's slowdown and by random noise. Return the time at which the last prompt ends."""
    chance = Random(seed)
    for _ in range(count):
        for name, slowdown in slowdowns.items():
            tokens = int(chance.expovariate(1 / 2000)) + 1
            seconds = slowdown * (0.01 + 1e-4 * tokens) * chance.uniform(0.8, 1.25)
            now += seconds / len(slowdowns)
            times.record(name, tokens, seconds, now)
    return now


@given(samples)
def test_a_slowdown_is_bounded(samples: list[tuple[str, int, float, float, bool]]) -> None:
    """Whatever times are recorded, a slowdown is within its bounds, and the predicted time is finite and not
    negative."""
    times, now = PrefillTimes(), 0.0
    for name, tokens, seconds, later_s, is_finished in samples:
        now += later_s
        (times.record if is_finished else times.record_unfinished)(name, tokens, seconds, now)
        assert all(FASTEST <= times.slowdown(name, now) <= SLOWEST for name in "abcd")
        assert times.slowdown("d", now) == 1.0
        assert all(0.0 <= times.usual_s(tokens) < 1e9 for tokens in (0, 1, 1000, 10**6))


@given(st.integers(0, 2**32), st.sampled_from([3.0, 10.0]))
def test_a_slow_worker_is_known_after_a_few_prompts(seed: int, slow: float) -> None:
    """After four prompts of a worker that became slow, its learned slowdown is more than a quarter of its true
    slowdown.

    The learned slowdowns of the other workers stay near 1, whatever the sizes of the prompts.
    """
    times = PrefillTimes()
    usual = dict.fromkeys("abcdefgh", 1.0)
    now = served(usual, seed, 40, times)
    assert all(times.slowdown(name, now) == pytest.approx(1.0, abs=0.3) for name in usual)
    for tokens in (1000, 2000, 3000, 2000):
        now += slow * 0.2
        times.record("a", tokens, slow * (0.01 + 1e-4 * tokens), now)
    assert times.slowdown("a", now) > slow / 4
    assert all(times.slowdown(name, now) == pytest.approx(1.0, abs=0.3) for name in "bcdefgh")


def test_a_slowdown_rises_without_a_jump() -> None:
    """If a worker's prompts take longer, its slowdown never falls. If the prompts take a hundredth longer, the slowdown
    rises by less than 0.05."""
    found = []
    for slow in range(100, 300):
        times = PrefillTimes()
        for at in range(40):
            for name in "abcdefgh":
                times.record(name, 1000, 0.1 * (slow / 100 if name == "a" else 1.0), float(at))
        found.append(times.slowdown("a", 40.0))
    assert (found[0], found[20]) == (1.0, 1.0)
    assert found[-1] > 2
    assert all(0 <= after - before < 0.05 for before, after in itertools.pairwise(found))


# Of 6,000 seeds, a prompt of 1,000 tokens that is 8 times late does not show in 5: the prompts before it were so long.
@given(st.integers(0, 2**32), st.integers(1000, 4000), st.floats(12.0, 20.0))
@example(244, 1000, 12.0)
@example(17880, 1000, 12.0)
def test_a_late_prompt_shows_a_slow_worker_before_its_sample(seed: int, tokens: int, late: float) -> None:
    """A worker whose unfinished prompt is late counts as slow at once, before the prompt is finished. It counts as
    usual again if the finished prompt turns out to have taken a usual time, or if nothing more is reported about the
    prompt for a while."""
    times = PrefillTimes()
    now = served(dict.fromkeys("abcd", 1.0), seed, 40, times)
    usual_s = times.usual_s(tokens)
    times.record_unfinished("a", tokens, late * usual_s, now)
    assert times.slowdown("a", now) > 1.3
    assert times.slowdown("a", now + 1.1 * late * usual_s) == pytest.approx(1.0, abs=0.3)
    times.record("a", tokens, usual_s, now)
    assert times.slowdown("a", now) == pytest.approx(1.0, abs=0.3)
    for _ in range(3):
        times.record_unfinished("a", tokens, late * usual_s, now)
        times.record_unfinished_lost("a", now)
    assert times.slowdown("a", now + 1.1 * late * usual_s) > 1.3


@given(st.integers(0, 2**32))
def test_a_worker_without_calls_becomes_a_usual_one(seed: int) -> None:
    """The slowdown of a worker that gets no more calls approaches 1."""
    times = PrefillTimes()
    now = served({"a": 10.0} | dict.fromkeys("bcdefgh", 1.0), seed, 30, times)
    before = times.slowdown("a", now)
    assert before > 3
    assert times.slowdown("a", now + 2 * MEMORY_S) < before
    assert times.slowdown("a", now + 10 * MEMORY_S) == 1.0


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(1e-3, 1.0), st.floats(1e-6, 1e-2))
def test_short_prompts_do_not_look_slow(short: int, long: int, fixed_s: float, token_s: float) -> None:
    """Two workers of equal speed have a slowdown near 1, even if one computes only short prompts and the other only
    long prompts."""
    assume(long >= 2 * short)
    times, now = PrefillTimes(), 0.0
    for _ in range(50):
        for name, tokens in (("a", short), ("b", long)):
            times.record(name, tokens, fixed_s + token_s * tokens, now)
    for name in "ab":
        assert times.slowdown(name, now) == pytest.approx(1.0, abs=0.1)


@given(st.integers(0, 2**32), st.floats(0.5, 1e4))
def test_a_single_pause_decides_little(seed: int, pause_s: float) -> None:
    """If one prompt takes much longer than predicted, the worker's slowdown rises to at most 2.5."""
    times = PrefillTimes()
    now = served(dict.fromkeys("abcdefgh", 1.0), seed, 20, times)
    times.record("a", 1000, pause_s, now)
    assert times.slowdown("a", now) <= 2.5


def test_a_forgotten_worker_is_unknown() -> None:
    times = PrefillTimes()
    served({"a": 10.0, "b": 1.0}, 1, 10, times)
    assert {*times.known()} == {"a", "b"}
    times.forget("a")
    times.forget("a")
    assert (times.slowdown("a", 0.0), {*times.known()}) == (1.0, {"b"})
