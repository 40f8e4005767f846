"""Tests of the choice of a worker for a new call. The choice by a loop, the choice by numpy and the definition are
compared.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from random import Random
from statistics import fmean, pstdev
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.cost import CostWeights, PolicyName, RoutingSettings
from cluster.policy.routing.fleet import Fleet, choose
from cluster.policy.routing.hot_prefixes import MAX_PREFIXES, HotPrefixes
from cluster.policy.routing.rendezvous import hash64
from cluster.policy.routing.router import FILTERS, Candidate, RouteCall, needs_parser
from cluster.policy.routing.version_split import Build

assert np.__name__ == "numpy", "a fleet uses numpy only if it is imported"

POLICIES = get_args(PolicyName)
NAMES = [f"w{number}" for number in range(12)]


def worker(worker_id: str, **fields: object) -> Candidate:
    """Return a worker of model m with 64 free slots. `fields`: fields with other values."""
    known: dict[str, object] = {
        "worker_id": worker_id, "model": "m", "build": Build("v1"), "free_sequences": 64, "free_tokens": 1_000_000,
        "running": 0, "waiting": 0, "kv_usage": 0.0, "healthy": True, "draining": False,
        "incarnation": f"{worker_id}-0",
    }  # fmt: skip
    return Candidate(**{**known, **fields})  # type: ignore[arg-type]


# Few different values, so that equal costs are frequent.
workers = st.builds(
    lambda name, restarted, **fields: worker(name, incarnation=f"{name}-{restarted:d}", **fields),
    st.sampled_from(NAMES),
    st.booleans(),
    build=st.sampled_from([Build("v1", "b1"), Build("v2", "b1"), Build("v1", "b2", "w2")]),
    free_sequences=st.integers(0, 3),
    free_tokens=st.sampled_from([0, 1000, 50_000]),
    running=st.integers(0, 2),
    waiting=st.integers(0, 2),
    unanswered=st.integers(0, 1),
    kv_usage=st.sampled_from([0.0, 0.5, 1.0]),
    healthy=st.integers(0, 5).map(bool),
    draining=st.integers(0, 5).map(lambda n: n == 0),
    retired=st.integers(0, 5).map(lambda n: n == 0),
    parses_tools=st.booleans(),
    prefill_tokens=st.sampled_from([0, 0, 3000]),
    resumed_prefill=st.sampled_from([0, 0, 100]),
    new_prefill=st.sampled_from([0, 100]),
    prefill_budget=st.sampled_from([150, 2000]),
    last_sent=st.sampled_from([0.0, 1.0, 2.0]),
    slowdown=st.sampled_from([1.0, 1.0, 0.7, 10.0]),
    slots=st.sampled_from([0, 8, 8, 32, 128]),
    adapters=st.frozensets(st.sampled_from("xy")),
    resident=st.frozensets(st.sampled_from("xy")),
)
fleets = st.lists(workers, max_size=12, unique_by=lambda c: c.worker_id)
calls = st.builds(
    RouteCall,
    st.just("m"),
    st.sampled_from([1, 100, 1000, 20_000]),
    reserved_slots=st.sampled_from([0, 0, 3]),
    excluded=st.sampled_from([frozenset(), frozenset({"w1-0", "w2-1"})]),
    versions=st.sampled_from([frozenset(), frozenset({"v1"}), frozenset({"v1", "v2"})]),
    bundle_digest=st.sampled_from(["", "b1", "b2"]),
    weight_digest=st.sampled_from(["", "", "w2"]),
    needs_tools=st.booleans(),
    cached=st.dictionaries(st.sampled_from([*NAMES, "gone"]), st.sampled_from([16, 800, 30_000]), max_size=6),
    sharing=st.sampled_from([0.0, 0.0, 0.3, 60.0]),
    affinity=st.sampled_from([0, 0, 1, 2**64 - 1]),
    prefix=st.integers(0, 2**64 - 1),
    call_id=st.text(max_size=5),
    adapter=st.sampled_from(["", "x", "z"]),
)
policies = st.builds(RoutingSettings, st.sampled_from(POLICIES))


def fleet_of(candidates: list[Candidate], settings: RoutingSettings, vector_from: int) -> Fleet:
    """Return a fleet with these workers. `vector_from`: number of workers from which the fleet uses numpy."""
    fleet = Fleet(settings, vector_from)
    for candidate in candidates:
        fleet.put(candidate)
    return fleet


@pytest.mark.slow
@given(
    fleets,
    calls,
    policies,
    st.sets(st.sampled_from([f"{name}-0" for name in NAMES]), max_size=3),
    st.randoms(use_true_random=False),
)
def test_the_worker_passes_and_is_the_cheapest(
    candidates: list[Candidate], call: RouteCall, settings: RoutingSettings, rejecting: set[str], chance: Random
) -> None:
    """The picked worker passes every filter, and no worker that passes has a lower cost.

    The numpy code and the Python loop make the same decision with the same scores, in any order of the rows.
    """
    decision = fleet_of(candidates, settings, 99).pick(call, rejecting)
    chance.shuffle(candidates)
    for vector_from in (0, 99):
        assert fleet_of(candidates, settings, vector_from).pick(call, rejecting) == decision
    if not rejecting:
        assert choose(call, candidates, settings) == decision
    if decision.reason == "kept_free":
        assert decision.worker_id is None
        return
    healthy = [dataclasses.replace(c, healthy=c.healthy and c.incarnation not in rejecting) for c in candidates]
    needed = dataclasses.replace(call, needs_tools=needs_parser(call.needs_tools, healthy))
    may = {c.worker_id for c in healthy if all(f.passes(needed, c) for f in FILTERS)}
    if not may and decision.worker_id is not None:
        (replaced,) = (c for c in healthy if c.worker_id == decision.worker_id)
        assert replaced.retired
        assert all(f.passes(needed, dataclasses.replace(replaced, retired=False)) for f in FILTERS)
        stay = [c for c in candidates if c.healthy and not c.draining and not c.retired]
        runs = [c for c in stay if c.build.is_one_of(call.versions, call.bundle_digest, call.weight_digest)]
        assert not any(not call.adapter or call.adapter in c.adapters for c in runs)
        return
    scores = {score.worker_id: score for score in decision.scores}
    assert scores.keys() == {c.worker_id for c in candidates}
    assert {name for name, score in scores.items() if not score.dropped} == may
    assert (decision.worker_id in may) if may else decision.worker_id is None
    if decision.worker_id is not None:
        if settings.policy != "power_of_two":
            assert decision.worker_id == decision.scores[0].worker_id
            assert all(scores[decision.worker_id].total <= scores[name].total for name in may)
        for name in may:
            assert sum(value for _, value in scores[name].parts) == pytest.approx(scores[name].total, abs=1e-6)


@given(st.lists(st.one_of(workers, st.sampled_from(NAMES)), max_size=40), calls, policies, st.sampled_from([0, 4, 99]))
def test_rows_that_change_are_rows_made_anew(
    changes: list[Candidate | str], call: RouteCall, settings: RoutingSettings, vector_from: int
) -> None:
    """After workers have joined, changed or left, a fleet decides like a new fleet that is built from the
    current workers.

    A decision that was made before a change keeps its scores.
    """
    fleet, left = Fleet(settings, vector_from), dict[str, Candidate]()
    for change in changes:
        earlier, then = fleet.pick(call), list(left.values())
        if isinstance(change, str):
            fleet.remove(change)
            left.pop(change, None)
        else:
            fleet.put(change)
            left[change.worker_id] = change
        assert earlier == choose(call, then, settings)
        assert fleet.pick(call) == choose(call, left.values(), settings)
        assert [*fleet.candidates] == sorted(left.values(), key=lambda c: c.worker_id)
        assert fleet.busy == {name for name, c in left.items() if c.resumed_prefill}


@pytest.mark.parametrize("vector_from", [0, 99])
@pytest.mark.parametrize("policy", ["cost", "least_load", "round_robin"])
def test_a_burst_of_equal_calls_spreads_over_equal_workers(policy: PolicyName, vector_from: int) -> None:
    """If 64 calls arrive together, and all eight workers hold the calls' prefix, the numbers of calls per worker have a
    coefficient of variation of at most 0.1."""
    fleet = fleet_of([worker(f"w{number}") for number in range(8)], RoutingSettings(policy), vector_from)
    call = RouteCall("m", 10_000, cached={f"w{number}": 9_600 for number in range(8)})
    sent = _send_all(fleet, call, 64, to_compute=400)
    counts = [sent[f"w{number}"] for number in range(8)]
    assert pstdev(counts) / fmean(counts) <= 0.1


@pytest.mark.parametrize("vector_from", [0, 99])
@pytest.mark.parametrize("holders", [0, 1, 3])
@pytest.mark.parametrize("tokens", [2_000, 10_000])
def test_a_burst_makes_no_hot_spot(holders: int, tokens: int, vector_from: int) -> None:
    """Of 64 calls with the same prefix that arrive together at eight workers, no worker gets more than 1.75 times the
    mean number of calls. This holds if none, one or three of the workers have the prefix cached. These workers may get
    a few more calls than the others, which must compute the prefix first."""
    fleet = fleet_of([worker(f"w{number}") for number in range(8)], RoutingSettings(), vector_from)
    prefix = tokens - 400
    cached, hot, sent = {f"w{number}": prefix for number in range(holders)}, HotPrefixes(), Counter[str]()
    for number in range(64):
        now = number / 64_000
        call = RouteCall("m", tokens, cached=dict(cached), sharing=hot.recent(1, now) if cached else 0.0)
        chosen = fleet.pick(call).worker_id
        assert chosen is not None
        sent[chosen] += 1
        if cached:
            hot.record(1, now)
        c = fleet.find(chosen)
        assert c is not None
        fleet.put(
            dataclasses.replace(
                c,
                free_sequences=c.free_sequences - 1,
                running=c.running + 1,
                unanswered=c.unanswered + 1,
                prefill_tokens=c.prefill_tokens + tokens - cached.get(chosen, 0),
                last_sent=1.0 + now,
            )
        )
        cached[chosen] = prefix
    assert max(sent.values()) <= 1.75 * 64 / 8


@given(st.lists(st.tuples(st.integers(0, 5000), st.floats(0, 3)), max_size=30), st.integers(0, 2**64 - 1))
def test_recent_calls_fade(sent: list[tuple[int, float]], prefix: int) -> None:
    """The count of recent calls with a prefix is at most the number of all calls with this prefix, and falls as time
    passes. The number of remembered prefixes is bounded."""
    hot, now, calls = HotPrefixes(), 0.0, Counter[int]()
    for other, later_s in [*sent, (prefix, 0.0)]:
        now += later_s
        hot.record(other, now)
        calls[other] += 1
        assert 1.0 <= hot.recent(other, now) <= calls[other]
        assert hot.recent(other, now + 1) < hot.recent(other, now)
    for number in range(2 * MAX_PREFIXES):
        hot.record(number, now)
    assert len(hot) == MAX_PREFIXES


@pytest.mark.parametrize("vector_from", [0, 99])
def test_calls_spread_by_size(vector_from: int) -> None:
    """Calls to workers of 10, 20 and 70 slots are spread in proportion to the sizes."""
    fleet = fleet_of(
        [worker(name, free_sequences=n) for name, n in (("s", 10), ("m", 20), ("l", 70))],
        RoutingSettings(),
        vector_from,
    )
    assert _send_all(fleet, RouteCall("m", 1), 50, to_compute=0) == {"s": 5, "m": 10, "l": 35}


@pytest.mark.parametrize("vector_from", [0, 99])
def test_small_engines_keep_their_prompts(vector_from: int) -> None:
    """A worker (the holder) has 1,000 tokens of a call's prompt in its cache. It gets the call, although an equal
    worker runs three sequences fewer. This holds if both workers have 8 slots, and if both have 64 slots.

    Then a third worker with 512 slots is added. A holder with 8 slots now loses the call; a holder with 64 slots
    still gets it.
    """
    call = RouteCall("m", 1032, cached={"holder": 1000})
    for slots in (8, 64):
        fleet = fleet_of(
            [
                worker("holder", slots=slots, free_sequences=slots - 3, running=3),
                worker("other", slots=slots, free_sequences=slots),
            ],
            RoutingSettings(),
            vector_from,
        )
        assert fleet.pick(call).worker_id == "holder"
        fleet.put(worker("large", slots=512, free_sequences=1))
        assert (fleet.pick(call).worker_id == "holder") is (slots == 64)
        fleet.remove("large")
        assert fleet.pick(call).worker_id == "holder"


def _send_all(fleet: Fleet, call: RouteCall, count: int, to_compute: int) -> Counter[str]:
    """Send equal calls before any of them is answered. Return the number of calls for each worker."""
    sent: Counter[str] = Counter()
    for number in range(count):
        chosen = fleet.pick(call).worker_id
        assert chosen is not None
        sent[chosen] += 1
        c = fleet.find(chosen)
        assert c is not None
        fleet.put(
            dataclasses.replace(
                c,
                free_sequences=c.free_sequences - 1,
                running=c.running + 1,
                prefill_tokens=c.prefill_tokens + to_compute,
                last_sent=1.0 + number,
            )
        )
    return sent


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_a_slow_worker_gets_few_calls(load: float) -> None:
    """A worker that needs ten times as long as the seven others gets at most a tenth as many calls as another worker.

    `load`: used share of the capacity of all workers. The workers compute one prompt after the other.
    """
    slowdowns = [10.0, *[1.0] * 7]
    names = [f"w{number}" for number in range(8)]
    fleet = fleet_of(
        [worker(name, slowdown=slow) for name, slow in zip(names, slowdowns, strict=True)], RoutingSettings(), 99
    )
    every_s, ends = 1 / (load * sum(1 / slow for slow in slowdowns)), {name: list[float]() for name in names}
    sent: Counter[str] = Counter()
    for number in range(2000):
        now = number * every_s
        for name, slow in zip(names, slowdowns, strict=True):
            left = ends[name] = [end for end in ends[name] if end > now]
            waits = 1000 * len(left)
            fleet.put(
                worker(name, slowdown=slow, running=len(left), free_sequences=500 - len(left), prefill_tokens=waits)
            )
        chosen = fleet.pick(RouteCall("m", 1000)).worker_id
        assert chosen is not None
        sent[chosen] += 1
        ends[chosen].append(max([now, *ends[chosen]]) + slowdowns[names.index(chosen)])
    assert sent["w0"] * 10 <= sent["w1"]


def test_full_holders_are_those_that_cost_less() -> None:
    """`full_holders` of a routing decision lists each worker that holds the prompt, has no capacity left, and would
    cost less than the chosen worker. A worker that drains, is unhealthy or has too much work is not listed.

    If the call's affinity key prefers the chosen worker, this worker's cost is reduced before the comparison.
    """
    key = hash64("tenant\0key")
    for tokens, affinity, named in ((20_000, 0, True), (1500, 0, True), (20_000, key, True), (1500, key, False)):
        call = RouteCall("m", tokens, cached={"b": tokens}, affinity=affinity)
        decision = choose(call, [worker("a"), worker("b", free_sequences=0, slots=64)])
        assert decision.worker_id == "a"
        assert [holder.worker_id for holder in decision.full_holders] == ["b"] * named
    call = RouteCall("m", 20_000, cached={"b": 20_000})
    for state in ({"draining": True}, {"healthy": False}, {"prefill_tokens": 400_000}):
        assert not choose(call, [worker("a"), worker("b", free_sequences=0, slots=64, **state)]).full_holders


def test_the_fullest_holder_is_found_among_many() -> None:
    """A full worker that holds most of a prompt is named, however many other workers hold its beginning."""
    workers = [worker(f"w{number:02}") for number in range(30)]
    workers[17] = worker("w17", free_sequences=0, slots=64)
    cached = {each.worker_id: 1000 for each in workers if each.worker_id != "w17"} | {"w17": 30_000}
    decision = choose(RouteCall("m", 31_000, cached=cached), workers)
    assert [holder.worker_id for holder in decision.full_holders] == ["w17"]


def test_a_key_prefers_one_worker_until_load_says_otherwise() -> None:
    """While the workers are equal, all calls with the same affinity key go to one worker, and different keys are
    spread over all workers.

    If this worker gets much more load than the others, calls with the key go to another worker.
    """
    fleet = fleet_of([worker(f"w{number}") for number in range(8)], RoutingSettings(), 99)
    keys = [RouteCall("m", 1000, affinity=hash64(f"tenant\0key {number}")) for number in range(400)]
    homes = Counter(fleet.pick(call).worker_id for call in keys)
    assert len(homes) == 8
    assert max(homes.values()) <= 2 * min(homes.values())
    call = keys[0]
    home = fleet.pick(call).worker_id
    assert home is not None
    assert dict(fleet.pick(call).scores[0].parts)["affinity"] == -CostWeights().affinity
    fleet.put(worker(home, running=4, free_sequences=60))
    assert fleet.pick(call).worker_id == home
    fleet.put(worker(home, running=40, free_sequences=24))
    assert fleet.pick(call).worker_id != home


@given(st.sets(st.sampled_from(NAMES), min_size=2), st.integers(0, 2**64 - 1))
def test_a_worker_that_leaves_moves_only_its_own_prefixes(names: set[str], prefix: int) -> None:
    """With consistent hashing, a prefix gets another worker only when its own worker leaves."""
    settings = RoutingSettings("consistent_hash")
    everyone = [worker(name) for name in sorted(names)]
    call = RouteCall("m", 100, prefix=prefix)
    home = choose(call, everyone, settings).worker_id
    for gone in everyone:
        again = choose(call, [c for c in everyone if c is not gone], settings).worker_id
        assert (again == home) is (gone.worker_id != home)


def test_explain_names_every_candidate() -> None:
    """The explanation is one line with the choice, the reason, the parts of each cost, and the filter that dropped each
    excluded candidate."""
    fleet = [worker("busy", running=16, free_sequences=48), worker("idle"), worker("leaving", draining=True)]
    text = choose(RouteCall("m", 100, cached={"busy": 100}), fleet).explain()
    assert text == (
        "to idle, least_loaded: idle 3600.000 (waiting_prefill 0.000, load 2000.000, queue 0.000, memory 0.000, "
        "uncached_tokens 1600.000); busy 34000.000 (waiting_prefill 0.000, load 34000.000, queue 0.000, memory 0.000, "
        "uncached_tokens 0.000); leaving draining"
    )
    assert choose(RouteCall("m", 100), []).explain() == "nowhere, no_worker: no candidates"


@pytest.mark.parametrize(
    ("load", "part"),
    [
        ({"running": 4}, "load"),
        ({"kv_usage": 0.4}, "memory"),
        ({"waiting": 1}, "queue"),
        ({"prefill_tokens": 2048}, "waiting_prefill"),
    ],
)
def test_each_kind_of_load_counts(load: dict[str, object], part: str) -> None:
    """Of two workers that differ only in one kind of load, the worker with less of this load is chosen, and the
    decision names this kind of load."""
    decision = choose(RouteCall("m", 100), [worker("a", **load), worker("b")])
    assert (decision.worker_id, decision.reason) == ("b", "least_loaded")
    best, other = (dict(score.parts) for score in decision.scores)
    assert {name for name in best if best[name] != other[name]} == {part}
    assert best[part] < other[part]


def test_replaced_workers_serve_an_adapter_until_others_have_it() -> None:
    """A worker that is being replaced gets a call for an adapter only while no worker that takes calls has loaded it,
    full or not."""
    call, has = RouteCall("m", 100, adapter="x"), frozenset("x")
    old, new = worker("old", adapters=has, retired=True), worker("new")
    assert choose(call, [old, new]).worker_id == "old"
    assert choose(call, [old]).worker_id is None
    assert choose(call, [dataclasses.replace(old, quarantined=True), new]).worker_id is None
    full = dataclasses.replace(new, adapters=has, free_sequences=0)
    assert choose(call, [old, full]).worker_id is None


def test_a_worker_with_the_adapter_in_a_slot_is_preferred() -> None:
    """A worker that has the call's adapter in a slot is preferred to a worker that must first copy the adapter into a
    slot, unless the first worker has much more load. A worker without the adapter is dropped."""
    call, has = RouteCall("m", 100, adapter="x"), frozenset("x")
    fleet = [worker("a", adapters=has), worker("b", adapters=has, resident=has), worker("c", resident=has)]
    decision = choose(call, fleet)
    assert decision.worker_id == "b"
    assert dict(decision.scores[1].parts)["adapter_switch"] == CostWeights().adapter
    assert decision.scores[2].dropped == "no_adapter"
    fleet[1] = dataclasses.replace(fleet[1], running=16, free_sequences=48)
    assert choose(call, fleet).worker_id == "a"
    assert choose(call, fleet[2:]).reason == "no_adapter"


@pytest.mark.parametrize("cached", [64, 4096, 100_000])
def test_the_worker_that_holds_most_of_a_prompt_gets_it(cached: int) -> None:
    """Among workers that are otherwise equal, the worker that holds most of the prompt is chosen."""
    call = RouteCall("m", 100_000, cached={"b": cached, "c": cached // 2})
    decision = choose(call, [worker("a"), worker("b"), worker("c")])
    assert (decision.worker_id, decision.reason) == ("b", "cached_prefix")


def test_load_outvotes_blocks() -> None:
    """A worker that holds the prompt's blocks is not chosen if it is nearly full, if many more prompt tokens than the
    call has wait there, or if many sequences wait there."""
    call = RouteCall("m", 5000, cached={"b": 5000})
    assert choose(call, [worker("a"), worker("b")]).worker_id == "b"
    for load in ({"running": 63, "free_sequences": 1}, {"prefill_tokens": 100_000}, {"waiting": 40}):
        assert choose(call, [worker("a"), worker("b", **load)]).worker_id == "a"
