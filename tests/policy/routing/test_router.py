"""Tests of routing: filters, scores, ties, and the reasons in the decision."""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import CompatibilityKey
from cluster.policy.routing.router import (
    FILTERS,
    SCORERS,
    Candidate,
    RouteCall,
    Router,
    Scorer,
    may_take_resumed,
    needs_parser,
    pick,
)
from cluster.policy.routing.version_split import Build

CALL = RouteCall("m", 100)
FREE = Candidate("w", "m", Build("v1"), 4, 1000, 0, 0, 0.0, healthy=True, draining=False)


def worker(worker_id: str, **changes: object) -> Candidate:
    """Return an idle worker with capacity, with these changed fields."""
    return dataclasses.replace(FREE, worker_id=worker_id, **changes)  # type: ignore[arg-type]


candidates = st.lists(
    st.builds(
        Candidate,
        worker_id=st.sampled_from("abcdefgh"),
        model=st.sampled_from(["m", "m", "n"]),
        build=st.just(Build("v1")),
        free_sequences=st.integers(0, 3),
        free_tokens=st.sampled_from([0, 99, 100, 500]),
        running=st.integers(0, 5),
        waiting=st.integers(0, 3),
        kv_usage=st.sampled_from([0.0, 0.5, 1.0]),
        healthy=st.sampled_from([True, True, False]),
        draining=st.sampled_from([False, False, True]),
        parses_tools=st.booleans(),
        last_sent=st.sampled_from([0.0, 1.0]),
    ),
    max_size=8,
    unique_by=lambda c: c.worker_id,
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "n"}, "other_model"),
        ({"healthy": False}, "unhealthy"),
        ({"draining": True}, "draining"),
        ({"free_sequences": 0}, "no_free_sequence"),
        ({"free_tokens": 99}, "too_few_free_tokens"),
        ({"parses_tools": False}, "no_tool_parser"),
    ],
)
def test_each_filter_drops_and_is_named(change: dict[str, object], reason: str) -> None:
    """A worker that a filter drops is never chosen, even if it is idle, and the decision names the filter."""
    call = dataclasses.replace(CALL, needs_tools=True)
    busy = worker("b", parses_tools=True, running=50, kv_usage=0.9, waiting=9)
    decision = pick(call, [worker("a", **{"parses_tools": True} | change), busy])
    assert (decision.worker_id, decision.reason) == ("b", "only_choice")
    assert {score.worker_id: score.dropped for score in decision.scores} == {"a": reason, "b": ""}


@pytest.mark.parametrize(
    ("load", "scorer"),
    [
        ({"running": 4}, "free_places"),
        ({"kv_usage": 0.4}, "free_memory"),
        ({"waiting": 1}, "short_queue"),
        ({"prefill_tokens": 2048}, "short_prefill"),
    ],
)
def test_each_kind_of_load_counts(load: dict[str, object], scorer: str) -> None:
    """If two workers differ only in one kind of load, the worker with less of this load is chosen. Only the score for
    this load differs between the two workers."""
    decision = pick(CALL, [worker("a", **load), worker("b")])
    assert (decision.worker_id, decision.reason) == ("b", "least_loaded")
    best, other = (dict(score.parts) for score in decision.scores)
    assert {name for name in best if best[name] != other[name]} == {scorer}
    assert best[scorer] > other[scorer]


def test_idle_workers_take_turns() -> None:
    fleet = [worker("a", last_sent=3.0), worker("b", last_sent=2.0), worker("c", last_sent=4.0)]
    assert pick(CALL, fleet).worker_id == "b"


def test_exactly_enough_room_is_enough() -> None:
    """A worker gets the call if it has exactly one free sequence and exactly the free tokens that the call needs."""
    assert pick(CALL, [worker("a", free_sequences=1, free_tokens=100)]).worker_id == "a"


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([], "no_worker"),
        ([worker("a", model="n")], "no_worker"),
        ([worker("a", healthy=False), worker("b", free_sequences=0)], "no_free_sequence"),
        ([worker("a", free_tokens=1), worker("b", draining=True)], "too_few_free_tokens"),
    ],
)
def test_nobody_is_said_with_the_nearest_reason(workers: list[Candidate], reason: str) -> None:
    """If no worker is chosen, the decision names the last filter that dropped a candidate."""
    decision = pick(CALL, workers)
    assert (decision.worker_id, decision.reason) == (None, reason)


def test_a_call_with_tools_does_not_wait_for_a_parser_that_nobody_has() -> None:
    """If any worker has a tool parser, a call with tools goes only to workers with a parser, even if these are busy. If
    no worker has a parser, the call may go to any worker, which refuses it. Calls without tools may go to any
    worker."""
    plain, parses = worker("a"), worker("b", parses_tools=True, free_sequences=0)
    assert needs_parser(True, [plain, parses])
    assert not needs_parser(True, [plain])
    assert not needs_parser(False, [plain, parses])
    call = dataclasses.replace(CALL, needs_tools=True)
    assert pick(call, [plain, parses]).reason == "no_free_sequence"
    assert pick(call, [plain]).reason == "no_tool_parser"
    assert pick(CALL, [plain, parses]).worker_id == "a"


def test_what_is_kept_free_stays_free() -> None:
    """A call that must leave three slots free is sent if the workers of its model have four free slots in total, and is
    not sent if they have three."""
    call = dataclasses.replace(CALL, reserved_slots=3)
    others = [worker("c", free_sequences=9, model="n"), worker("d", free_sequences=9, draining=True)]
    assert pick(call, [worker("a", free_sequences=2), worker("b", free_sequences=2), *others]).worker_id == "a"
    decision = pick(call, [worker("a", free_sequences=2), worker("b", free_sequences=1), *others])
    assert (decision.worker_id, decision.reason) == (None, "kept_free")


def test_ties_go_to_more_room_then_to_the_name() -> None:
    """Of equally loaded workers, the worker that can take more sequences is chosen. If these numbers are equal too, the
    first worker by name is chosen."""
    assert pick(CALL, [worker("a"), worker("b", free_sequences=8)]).worker_id == "b"
    assert pick(CALL, [worker("b"), worker("a")]).worker_id == "a"


@pytest.mark.parametrize(
    ("begun", "there", "goes"),
    [
        ("float32-tp1-pp1-v2", "float32-tp1-pp1-v2", True),
        ("float32-tp1-pp1-v2", "float32-tp1-pp1", False),
        ("float32-tp1-pp1", "float32-tp1-pp1-v2", True),
        ("float32-tp1-pp1", "bfloat16-tp1-pp1-v2", False),
        ("bfloat16-fp8-tp2-pp1", "bfloat16-fp8-tp2-pp1", True),
    ],
)
def test_noise_binds_seeded_calls_alone(begun: str, there: str, goes: bool) -> None:
    """A call with a seed resumes only on engines that draw the same random numbers.

    A call without a seed may resume on any engine with an equal compatibility key.
    """
    one = worker("a", compatibility_key=CompatibilityKey("w", "b", there), prefill_budget=250)
    assert (
        pick(RouteCall("m", 100, compatibility_key=CompatibilityKey("w", "b", begun)), [one]).worker_id == "a"
    ) is goes
    assert CompatibilityKey("w", "b", "float32-tp1-pp1-v2").unseeded == CompatibilityKey("w", "b", "float32-tp1-pp1")


def test_a_step_takes_continued_calls_up_to_its_budget() -> None:
    """While a resumed prompt waits at a worker, the pacing budget bounds the prompt tokens of resumed and new calls
    together. Without a resumed prompt, new calls are not bounded."""
    like = CompatibilityKey("w", "b", "c")
    one, goes_on = (
        worker("a", compatibility_key=like, prefill_budget=250),
        RouteCall("m", 100, compatibility_key=like),
    )
    cases = [
        (0, 0, True, True),
        (0, 400, False, True),
        (100, 0, True, True),
        (100, 100, False, False),
        (200, 0, False, False),
    ]
    for replaying, beginning, continued, begins in cases:
        full = dataclasses.replace(one, resumed_prefill=replaying, new_prefill=beginning)
        assert (pick(goes_on, [full]).worker_id is not None) == continued
        assert (pick(CALL, [full]).worker_id is not None) == begins
    assert pick(RouteCall("m", 900, compatibility_key=like), [one]).worker_id == "a", "a long one goes alone"
    some = dataclasses.replace(one, resumed_prefill=200)
    assert pick(RouteCall("m", 900, compatibility_key=like, uncached_tokens=50), [some]).worker_id == "a", (
        "what is computed counts"
    )
    assert pick(RouteCall("m", 900, compatibility_key=like, uncached_tokens=51), [some]).worker_id is None


def test_a_continued_call_goes_back_to_where_its_blocks_are() -> None:
    """A resumed call goes to the worker that holds its KV blocks, even if this worker is much busier than
    another.

    It goes to another worker if this worker already has too many resumed prompt tokens for one step. The
    call's cached tokens do not count as such tokens.
    """
    like = CompatibilityKey("w", "b", "c")
    home = worker(
        "a",
        compatibility_key=like,
        prefill_budget=250,
        incarnation="i",
        running=60,
        free_sequences=1,
        waiting=3,
    )
    other = worker("b", compatibility_key=like, prefill_budget=250, incarnation="j")
    call = RouteCall("m", 100, compatibility_key=like, cached_on="i", uncached_there=10)
    assert pick(call, [home, other]).worker_id == "a"
    assert pick(dataclasses.replace(call, cached_on="gone"), [home, other]).worker_id == "b"
    for replaying, goes in ((240, "a"), (241, "b")):
        assert pick(call, [dataclasses.replace(home, resumed_prefill=replaying), other]).worker_id == goes
    assert pick(call, [dataclasses.replace(home, free_sequences=0), other]).worker_id == "b"
    assert pick(dataclasses.replace(call, excluded=frozenset("i")), [home, other]).worker_id == "b"
    assert (
        pick(call, [dataclasses.replace(home, compatibility_key=CompatibilityKey("x", "b", "c")), other]).worker_id
        == "b"
    )


@given(
    st.integers(0, 3), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 400), st.booleans()
)
def test_who_takes_no_continued_call_at_all_takes_none(
    free: int, replaying: int, beginning: int, budget: int, tokens: int, known: bool
) -> None:
    """The cheap check before the routing of resumed calls never excludes a worker that could get such a call."""
    like = CompatibilityKey("w", "b", "c")
    one = worker(
        "a",
        compatibility_key=like,
        free_sequences=free,
        resumed_prefill=replaying,
        new_prefill=beginning,
        prefill_budget=budget,
    )
    goes = pick(RouteCall("m", tokens, compatibility_key=like if known else None), [one]).worker_id is not None
    assert may_take_resumed(one) or not goes


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(6, 10)), min_size=2, max_size=5), st.integers(2, 8))
def test_continued_calls_that_fall_together_spread_evenly(loads: list[tuple[int, int]], calls: int) -> None:
    """Resumed calls that come at the same time are spread evenly over the workers, even if the reported loads differ a
    little."""
    like = CompatibilityKey("w", "b", "c")
    fleet = {
        str(number): worker(
            str(number), free_sequences=64 - running, running=running, waiting=waiting, free_tokens=10**6,
            compatibility_key=like, prefill_budget=1600,
        )
        for number, (waiting, running) in enumerate(loads)
    }  # fmt: skip
    taken: Counter[str] = Counter()
    for _ in range(calls):
        chosen = pick(RouteCall("m", 400, compatibility_key=like), fleet.values()).worker_id
        assert chosen is not None
        taken[chosen] += 1
        c = fleet[chosen]
        fleet[chosen] = dataclasses.replace(
            c, free_sequences=c.free_sequences - 1, running=c.running + 1, resumed_prefill=c.resumed_prefill + 400,
            prefill_tokens=c.prefill_tokens + 400,
        )  # fmt: skip
    counts = [taken[worker_id] for worker_id in fleet]
    assert max(counts) - min(counts) <= 1


def test_explain_names_every_candidate() -> None:
    """The explanation is one line with the choice, the reason, the scores, and the filter that dropped each
    candidate."""
    text = pick(CALL, [worker("busy", running=4), worker("idle"), worker("leaving", draining=True)]).explain()
    assert text == (
        "to idle, least_loaded: idle 1.000 (free_places 1.000, free_memory 1.000, short_queue 1.000, "
        "short_prefill 1.000); busy 0.875 (free_places 0.500, free_memory 1.000, short_queue 1.000, "
        "short_prefill 1.000); leaving draining"
    )
    assert pick(CALL, []).explain() == "nowhere, no_worker: no candidates"


@given(candidates, st.randoms(use_true_random=False))
def test_the_choice_is_the_best_of_those_who_may(workers: list[Candidate], chance: Random) -> None:
    """The chosen worker passes all filters, and no other worker that passes them has a higher score.

    All candidates are listed in the decision, and the order in which they are given is irrelevant.
    """
    decision = pick(CALL, workers)
    may = {c.worker_id for c in workers if all(f.passes(CALL, c) for f in FILTERS)}
    scores = {score.worker_id: score for score in decision.scores}
    assert sorted(scores) == sorted(c.worker_id for c in workers)
    assert {i for i, score in scores.items() if not score.dropped} == may
    assert (decision.worker_id in may) if may else decision.worker_id is None
    for worker_id in may:
        assert decision.worker_id is not None
        assert scores[worker_id].total <= scores[decision.worker_id].total
        assert all(0.0 <= value <= 1.0 for _, value in scores[worker_id].parts)
        assert 0.0 <= scores[worker_id].total <= 1.0
    shuffled = [*workers]
    chance.shuffle(shuffled)
    assert pick(CALL, shuffled) == decision


def test_weights_decide_between_scorers() -> None:
    """A score with a large enough weight outweighs all other scores. A score without a weight is refused."""
    likes_b = Scorer("likes_b", lambda _, c: float(c.worker_id == "b"), weight=10.0)
    router = Router(scorers=(*SCORERS, likes_b))
    assert router.pick(CALL, [worker("a"), worker("b", kv_usage=0.9, running=9)]).worker_id == "b"
    with pytest.raises(ValueError, match="weight above 0"):
        Router(scorers=(dataclasses.replace(likes_b, weight=0.0),))
