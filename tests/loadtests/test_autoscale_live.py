"""Tests of those parts of the load test `autoscale_live` that need no Ray: its calls, and the comparison of their
answers."""

from __future__ import annotations

import asyncio
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.observe.events import EVENTS
from loadtests.autoscale_live.calls import Callers, CallResult, compare, play
from loadtests.autoscale_live.choice import sweep_policies
from loadtests.autoscale_live.cold import STARTED, starts_in
from loadtests.autoscale_live.traffic import Engine, PlannedCall, plan, share_of_most
from tests.support.cluster import until


@given(st.integers(0, 99), st.floats(30, 300))
def test_equal_seeds_give_equal_calls(seed: int, seconds: float) -> None:
    """Equal seeds give equal calls. The calls are ordered by time, lie within the run, use both clients, and have the
    planned stream lengths."""
    engine = Engine()
    calls = plan(seed, seconds, engine, 4)
    assert calls == plan(seed, seconds, engine, 4)
    assert [call.at_s for call in calls] == sorted(call.at_s for call in calls)
    assert all(0 <= call.at_s < seconds for call in calls)
    assert all(
        call.tokens * engine.decode_s + engine.decode_s >= 5 and call.tokens * engine.decode_s <= 60 for call in calls
    )
    assert abs(sum(call.face for call in calls) - len(calls) / 2) <= 1


def test_the_most_is_seventy_percent_of_all_replicas() -> None:
    """At the maximum of the demand curve, the planned work is 70 % of the replicas' capacity.

    So the planned work over the whole curve, averaged over many seeds, is 70 % of the capacity times the mean of the
    curve.
    """
    engine, seconds, seeds = Engine(), 200.0, range(200)
    work = sum(call.tokens for seed in seeds for call in plan(seed, seconds, engine, 4)) / len(seeds)
    mean_share = sum(share_of_most(i / 1000) for i in range(1000)) / 1000
    assert work == pytest.approx(0.7 * 4 * engine.tokens_per_s * seconds * mean_share, rel=0.03)
    assert max(share_of_most(i / 1000) for i in range(1001)) == 1.0
    assert math.isclose(share_of_most(0.75), 0.08)


def test_answers_of_one_prompt_begin_alike() -> None:
    """A shorter answer to a prompt is a prefix of a longer answer, except for a last character that is cut in two. Any
    other difference is reported with its position. Failed calls stay failed."""
    texts = [(0, "abc", ""), (0, "abcdef", ""), (0, "abx", ""), (1, "zz", ""), (0, "q", "cut"), (0, "ab\ufffd", "")]
    calls = [CallResult(PlannedCall(0, 1, 0, number), "sdk", text=text, fault=fault) for number, text, fault in texts]
    compare(calls)
    other = "differs from an undisturbed call at character 2 of 3: 'x' instead of 'cdef' "
    other += "(prompt 0 at 0.0 s by sdk, 0 resumes)"
    assert [call.fault for call in calls] == ["", "", other, "", "cut", ""]


async def test_calls_end_with_what_they_are_made_for() -> None:
    """`play` makes planned calls while another task runs. Once that task has ended, no further call begins, and `play`
    does not wait for the planned times of the remaining calls."""

    class Answering(Callers):
        def __init__(self) -> None:
            self.made: list[PlannedCall] = []

        async def call(self, planned: PlannedCall) -> CallResult:
            self.made.append(planned)
            return CallResult(planned, "sdk")

    callers, done = Answering(), asyncio.Event()
    beside = asyncio.create_task(_until(done))
    planned = [PlannedCall(0.0, 1, 0, 0), PlannedCall(0.01, 1, 0, 1), PlannedCall(3600.0, 1, 0, 2)]
    playing = asyncio.create_task(play(callers, planned, beside))
    await until(lambda: len(callers.made) == 2, "two are made")
    done.set()
    assert [result.planned for result in await asyncio.wait_for(playing, 60)] == planned[:2]


async def _until(done: asyncio.Event) -> None:
    await done.wait()


@pytest.mark.slow
@pytest.mark.parametrize("use", [0.1, 0.6])
def test_choosing_a_replica_saves_less_than_a_stream(use: float) -> None:
    """Removing the replica with the fewest streams, instead of a random replica, moves fewer streams.

    On average, the difference is less than one stream. If a removed replica may run until its streams end, no stream
    moves.
    """
    sweep = sweep_policies(use, 20.0, 1.0, random.Random(2))
    assert 0 <= sweep.blind - sweep.fewest < 1.0
    assert 0 <= sweep.blind_moved - sweep.fewest_moved < 1.0
    assert sweep.blind_moved <= sweep.blind
    assert sweep.blind == pytest.approx(use * 16, rel=0.1), "as many as the places that are taken"
    assert sweep_policies(use, 20.0, 1e9, random.Random(2)).blind_moved == 0


def test_the_parts_of_a_start_are_found_in_what_replicas_print() -> None:
    """The times of a start are read from its event, and other lines that replicas print are passed over."""
    assert STARTED in EVENTS
    event = json.dumps({"event": STARTED, "began": 12.5, "opened_s": 0.25, "engine_s": 3.0})
    other = json.dumps({"event": "worker.ready", "reason": STARTED})
    assert list(starts_in(f":job_id:03\n{event}\n{other}\nafter {STARTED}\n{event}")) == [(12.5, 3.0, 0.25)] * 2
