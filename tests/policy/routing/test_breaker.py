"""Tests of circuit breakers: failing workers get no calls, the last worker still gets calls, and one answered call
closes a breaker.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.breaker import FAILURES, KEPT_S, LONGEST_PAUSE_S, PAUSE_S, SHOWN_STEPS, TRIAL_S, Breakers

WORKERS = ("a", "b", "c")
events = st.lists(st.tuples(st.sampled_from(WORKERS), st.booleans(), st.floats(0.0, 3.0)), max_size=80)


@given(events)
def test_failures_never_close_every_door(steps: list[tuple[str, bool, float]]) -> None:
    """The breaker of at least one worker stays closed, whichever calls fail."""
    breakers, now = Breakers(), 0.0
    for worker, answers, pause_s in steps:
        now += pause_s
        if not breakers.allows(worker, now):
            continue
        breakers.record_sent(worker, now)
        if answers:
            breakers.record_success(worker)
        else:
            breakers.record_failure(worker, str(now), (), [other for other in WORKERS if other != worker], now)
        assert breakers.open < len(WORKERS)
        assert any(breakers.allows(each, now) for each in WORKERS)


def test_a_trial_is_one_call_and_its_answer_closes() -> None:
    """After the pause, an open breaker lets a single probe through.

    A failed probe doubles the pause up to a bound, and an answered probe closes the breaker.
    """
    breakers, now = Breakers(), 0.0
    for number in range(FAILURES):
        assert breakers.allows("a", now)
        breakers.record_failure("a", str(number), (), ["b"], now)
    pause_s = PAUSE_S
    for _ in range(8):
        assert not breakers.allows("a", now + pause_s * 0.99)
        now += pause_s
        assert breakers.allows("a", now)
        breakers.record_sent("a", now)
        assert not breakers.allows("a", now)
        assert breakers.allows("a", now + TRIAL_S), "a trial whose caller has gone does not block for ever"
        breakers.record_failure("a", "probe", (), ["b"], now)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    now += pause_s
    breakers.record_sent("a", now)
    breakers.record_success("a")
    assert breakers.allows("a", now)
    breakers.record_failure("a", "probe", (), ["b"], now)
    assert breakers.allows("a", now), "its failures count anew"


def test_who_stands_still_is_spared_though_nobody_else_is_there() -> None:
    """A stalled worker gets no calls during the breaker's pause, even if it is the only worker."""
    breakers = Breakers()
    breakers.record_stall("a", 0.0)
    assert not breakers.allows("a", PAUSE_S * 0.9)
    assert breakers.allows("a", PAUSE_S)
    breakers.retain([], KEPT_S)
    assert not breakers.allows("a", 0.5), "not forgotten while its link is away"
    breakers.retain(["a"], KEPT_S + PAUSE_S)
    assert breakers.open == 1, "not forgotten while it is linked"
    breakers.retain([], KEPT_S + PAUSE_S)
    assert breakers.open == 0, "forgotten once its link has been away for long"


def test_who_was_only_out_of_sight_needs_no_trial() -> None:
    """If the gateway merely could not reach a worker, the worker's breaker closes without a probe call, once the
    worker has reported enough new engine steps after the pause.

    Steps before the end of the pause, or too few steps, do not close the breaker. If the worker becomes
    unreachable again before it has answered a call, the pause is twice as long.
    """
    breakers, now = Breakers(), PAUSE_S
    breakers.record_stall("a", 0.0, unseen=True)
    for steps in (0, 100, 100 + SHOWN_STEPS - 1):
        breakers.record_steps("a", now, steps)
        breakers.record_sent("a", now)
        assert not breakers.allows("a", now), "its trial is not answered"
    breakers.record_steps("a", PAUSE_S * 0.9, 1000)
    assert not breakers.allows("a", PAUSE_S * 0.9)
    breakers.record_steps("a", now, 100 + SHOWN_STEPS)
    breakers.record_sent("a", now)
    assert breakers.allows("a", now)
    assert not breakers.open
    breakers.record_stall("a", now, unseen=True)
    breakers.record_steps("a", now, 2000)
    breakers.record_steps("a", now + 1.9 * PAUSE_S, 3000)
    assert not breakers.allows("a", now + 1.9 * PAUSE_S), "twice as long as before"
    breakers.record_steps("a", now + 2 * PAUSE_S, 3000)
    assert breakers.allows("a", now + 2 * PAUSE_S)


@pytest.mark.parametrize("unseen", [True, False])
def test_steps_say_nothing_of_calls_that_fail(unseen: bool) -> None:
    """Engine steps do not close a breaker that was opened by failed calls or by a stall."""
    breakers, now = Breakers(), 3 * PAUSE_S
    breakers.record_stall("a", 0.0, unseen=unseen)
    if unseen:
        breakers.record_failure("a", "probe", (), ["b"], PAUSE_S)
    for steps in (100, 1000):
        breakers.record_steps("a", now, steps)
        breakers.record_sent("a", now)
        assert not breakers.allows("a", now)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.data())
def test_calls_that_every_worker_fails_open_no_breaker(order: list[int], data: st.DataObject) -> None:
    """Calls that fail on each worker that they try leave all breakers closed, once each has failed on two workers.

    The calls fail in any order, and all at once on the first worker if the order says so.
    """
    breakers = Breakers()
    tried: dict[int, list[str]] = {}
    for call in [*order, *range(10), *range(10)]:
        failed = tried.setdefault(call, [])
        if left := [worker for worker in WORKERS if worker not in failed]:
            worker = data.draw(st.sampled_from(left))
            others = [other for other in WORKERS if other != worker]
            breakers.record_failure(worker, str(call), tuple(failed), others, 0.0)
            failed.append(worker)
    assert breakers.open == 0
    assert all(breakers.allows(worker, 0.0) for worker in WORKERS)


def test_one_call_counts_once() -> None:
    """A call with many requests that one worker fails counts as one failure of the worker."""
    breakers = Breakers()
    for _ in range(10 * FAILURES):
        breakers.record_failure("a", "batch", (), ["b"], 0.0)
    assert breakers.open == 0


def test_a_third_worker_that_answers_proves_the_two_at_fault() -> None:
    """Two broken workers of three get no more calls, because the third answers what they have failed."""
    breakers = Breakers()
    for number in range(FAILURES):
        call = str(number)
        breakers.record_failure("a", call, (), ["b", "c"], 0.0)
        breakers.record_failure("b", call, ("a",), ["a", "c"], 0.0)
        assert breakers.open == 0
        breakers.record_success("c")
        breakers.record_proof(("a", "b"), call, WORKERS, 0.0)
    assert sorted(breakers.rejecting(0.0)) == ["a", "b"]


def test_a_suspect_call_is_no_probe() -> None:
    """A probe that two workers have failed neither lengthens the pause nor blocks the next probe."""
    breakers = Breakers()
    for number in range(FAILURES):
        breakers.record_failure("a", str(number), (), ["b", "c"], 0.0)
    breakers.record_sent("a", PAUSE_S)
    breakers.record_failure("a", "poison", ("b",), ["b", "c"], PAUSE_S)
    assert breakers.allows("a", PAUSE_S)
