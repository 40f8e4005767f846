"""Failure detection from a worker's beats, steps and acknowledgements. Failed workers are found, and busy workers are
not suspected."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import EngineLoad
from cluster.gateway.links.liveness import LATE_S, LinkLiveness, Waking

BUSY = EngineLoad(running=3, steps=1, step_s=0.02, step_p99_s=0.03)


def alive(load: EngineLoad = BUSY) -> LinkLiveness:
    """Return the liveness of a worker that has sent a heartbeat at time 0."""
    liveness = LinkLiveness(0.0, hang_s=0.5, silence_s=5.0)
    liveness.record_beat(load, 0, 0, 0.0)
    return liveness


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 0.4),
            st.sampled_from(["step", "prefill", "rest"]),
            st.integers(0, 3),
        ),
        max_size=60,
    )
)
def test_who_beats_and_steps_or_says_why_not_is_not_suspected(story: list[tuple[float, str, int]]) -> None:
    """No mixture of steps, reported work, idle time and messages in either direction raises a false alarm. A false
    alarm would repeat the prefills of all calls of the worker."""
    liveness, now, load, sent = alive(), 0.0, BUSY, 0
    for pause_s, what, messages in story:
        now += pause_s
        if what == "step":
            load = replace(load, running=3, steps=load.steps + 1, busy="")
        elif what == "prefill":
            load = replace(load, running=3, busy="prefill")
        else:
            load = replace(load, running=0, busy="")
        for _ in range(messages):
            sent += 1
            liveness.record_sent(sent, now)
        liveness.record_received(sent, sent, now)
        liveness.record_beat(load, sent, sent, now)
        assert liveness.suspicion(now) is None


@pytest.mark.parametrize(
    ("reason", "at"),
    [("silent", 0.5), ("hung", 0.5), ("deaf", 1.0), ("mute", 1.0)],
)
def test_each_way_of_standing_still_is_found_by_its_bound(reason: str, at: float) -> None:
    """Each kind of link failure is detected within its time limit. The reported reason is the one that breakers and
    metrics use."""
    liveness = alive()
    if reason == "deaf":
        liveness.record_sent(1, 0.0)
    for tick in range(1, 20):
        now = tick * 0.1
        if reason != "silent":
            steps = 1 if reason == "hung" else 1 + tick
            liveness.record_beat(replace(BUSY, steps=steps), 0, 1 if reason == "mute" else 0, now)
        due, suspicion = liveness.due, liveness.suspicion(now)
        assert (suspicion is None) is (now <= due), "`due` is when the suspicion begins"
        if now <= at:
            assert suspicion is None
        elif suspicion is not None:
            assert suspicion.reason == reason
            assert now <= at + 0.21
            return
    raise AssertionError("never suspected")


def test_long_steps_get_longer() -> None:
    """An engine whose steps usually take a second is not reported as stuck after half a second."""
    slow = EngineLoad(running=1, steps=1, step_s=0.9, step_p99_s=1.0)
    liveness = alive(slow)
    for tick in range(1, 50):
        liveness.record_beat(slow, 0, 0, tick * 0.1)
        assert liveness.suspicion(tick * 0.1) is None
    liveness.record_beat(slow, 0, 0, 5.1)
    suspicion = liveness.suspicion(5.1)
    assert suspicion is not None
    assert suspicion.reason == "hung"


def test_who_has_never_beaten_gets_the_time_to_connect() -> None:
    """A worker is not suspected of a hang before it has connected its heartbeat stream. Connecting may take longer than
    the time limit for a hang."""
    liveness = LinkLiveness(0.0, hang_s=0.5, silence_s=5.0)
    assert liveness.suspicion(4.9) is None
    assert liveness.suspicion(5.1) is not None


@given(st.lists(st.tuples(st.floats(0.0, 0.1), st.floats(0.0, 10.0)), max_size=30), st.floats(0.0, 1.0))
def test_what_one_oversleeps_is_nobodys_silence(rests: list[tuple[float, float]], part: float) -> None:
    """The waking time (the clock of the failure detection) counts each sleep in full. If a sleep ends late, at most
    LATE_S of the delay is counted. The waking time never goes backward, and never runs ahead of the clock."""
    clock, now, waked = Waking(0.0, 0.0), 0.0, 0.0
    for rest_s, late_s in rests:
        clock.rest(now, rest_s)
        began, now = now, now + rest_s + late_s
        within = clock.at(began + part * (now - began))  # a reading while the owner sleeps or oversleeps
        waked, before = clock.at(now), waked
        assert before <= within <= waked
        assert before + rest_s - 1e-9 <= waked <= before + rest_s + min(late_s, LATE_S) + 1e-9
    assert waked <= now + 1e-6


@given(st.integers(1, 40), st.floats(0.0, 3.0))
def test_on_a_busy_machine_nobody_is_silent_before_its_time(looks: int, late_s: float) -> None:
    """If the gateway's own checks are delayed, heartbeats with the same delay raise no alarm. A dead worker is still
    found after the usual number of checks."""
    rest_s, bound_s = 0.05, 0.5
    clock, now = Waking(0.0, rest_s), 0.0
    liveness = alive()
    for _ in range(looks):
        clock.rest(now, rest_s)
        now += rest_s + late_s
        liveness.record_beat(replace(BUSY, steps=int(now * 1000)), 0, 0, clock.at(now))
        assert liveness.suspicion(clock.at(now)) is None
    died = clock.at(now)
    for look in range(1, 12):
        assert liveness.suspicion(clock.at(now)) is None or look > bound_s / (rest_s + LATE_S)
        clock.rest(now, rest_s)
        now += rest_s + late_s
    suspicion = liveness.suspicion(clock.at(now))
    assert suspicion is not None
    assert suspicion.reason == "silent"
    assert clock.at(now) - died <= 11 * (rest_s + LATE_S) + 1e-9
