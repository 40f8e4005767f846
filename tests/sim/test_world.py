"""Tests of the simulated cluster: runs are reproducible, fairness properties hold, and unfair orders are detected."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worker.engine.simulated.config import SimConfig
from loadtests.sim.events import EventQueue
from loadtests.sim.traffic import Lengths, PromptMaker, SimTenant, clipped, made_up
from loadtests.sim.world import VOCAB, World, WorldConfig

pytestmark = pytest.mark.slow

ENGINE = SimConfig(vocab=VOCAB, token_hi=VOCAB, max_model_len=4096, max_num_seqs=8, kv_blocks=2048, decode_ms=20.0)


def small(tenants: list[SimTenant], *, gateways: int = 2, fair: bool = True, seed: int = 1) -> World:
    """Return a simulated cluster of two workers with eight slots each."""
    return World(WorldConfig(tenants, workers=2, gateways=gateways, fair=fair, seed=seed, engine=ENGINE))


SHORT, LONG = [Lengths(600, 10), Lengths(300, 20)], [Lengths(100, 200), Lengths(60, 300)]


@cache
def crowded(gateways: int = 2, fair: bool = True) -> World:
    """Run a simulated cluster for 40 s of virtual time, and return it. Its three tenants always have a backlog.

    One tenant has a weight of 2. One tenant uses a single gateway.
    """
    tenants = [
        SimTenant("short", SHORT, backlog=8),
        SimTenant("long", LONG, backlog=8, gateways=(1,)),
        SimTenant("heavy", LONG, backlog=8, weight=2.0),
    ]
    return small(tenants, gateways=gateways, fair=fair).run(40.0)


WEIGHTS = {"short": 1.0, "long": 1.0, "heavy": 2.0}


def test_equal_seeds_equal_runs() -> None:
    """Runs with equal seeds are equal, and runs with different seeds differ."""
    ends = [small([SimTenant("a", SHORT, rate_s=5.0)], seed=s).run(10.0).observer.tenants["a"] for s in (3, 3, 4)]
    assert ends[0].ttft_s == ends[1].ttft_s
    assert ends[0].ttft_s != ends[2].ttft_s


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_backlogged_tenants_share_by_weight(gateways: int) -> None:
    """Tenants that always have calls waiting are served in proportion to their weights, with any number of
    gateways.

    The largest difference in service between two tenants is at most one unit U. U is the larger of the longest
    prompt's cost and the cost of the most tokens that a worker held at once. Each tenant gets at least four
    fifths of its share.
    """
    seen = crowded(gateways).observer
    assert seen.largest_gap(list(WEIGHTS), WEIGHTS, 0.0) <= seen.unit()
    assert seen.smallest_share(list(WEIGHTS), WEIGHTS, 5.0, window_s=30.0) >= 0.8


def test_first_come_first_served_does_not() -> None:
    """If calls are served in order of arrival, the largest gap in service between tenants is more than three times as
    large as in fair order."""
    fair, fifo = crowded(2, True).observer, crowded(2, False).observer
    assert fifo.largest_gap(list(WEIGHTS), WEIGHTS, 0.0) > 3 * fair.largest_gap(list(WEIGHTS), WEIGHTS, 0.0)


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_no_room_stays_empty_and_none_is_promised_twice(gateways: int) -> None:
    """While a call waits, free capacity is used within 200 ms. The credits never exceed the capacity, and the queue
    inside the engine stays short."""
    world = crowded(gateways)
    assert world.observer.longest_beside_room_s <= 0.2
    assert world.observer.most_promised_over_room <= 0
    assert max(worker.most_waiting for worker in world.workers) <= 2


def test_a_flood_costs_the_quiet_little() -> None:
    """A quiet tenant gets its first tokens in time although another tenant has 200 waiting calls.

    If the same calls are served in the order of their arrival, the quiet tenant's first tokens are late.
    """
    quiet = SimTenant("quiet", SHORT, rate_s=1.0)
    flood = SimTenant("flood", LONG, backlog=200)
    fair, fifo = (small([quiet, flood], fair=fair).run(40.0).observer.ttft("quiet", 0.9, 2.0) for fair in (True, False))
    assert fair < 2.0
    assert not fifo < 10 * fair  # the quiet tenant is not served at all with some seeds


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(1, 60)), min_size=1, max_size=3), st.integers(1, 3))
@settings(max_examples=5, deadline=None)
def test_every_call_ends_once_with_its_tokens(lengths: list[tuple[int, int]], gateways: int) -> None:
    """After arrivals stop, every call has ended with all of its tokens, and no worker or gateway holds capacity."""
    tenants = [SimTenant(f"t{i}", clipped([pair]), rate_s=3.0) for i, pair in enumerate(lengths)]
    world = small(tenants, gateways=gateways)
    world.run(4.0)
    world.stop_arrivals()
    world.run(12.0)
    for i, (_, output) in enumerate(lengths):
        tenant = world.observer.tenants.get(f"t{i}")
        assert tenant is None or tenant.output_tokens == tenant.ended * output
        assert tenant is None or tenant.waiting == 0
    assert all(worker.live == 0 and worker.tokens == 0 for worker in world.workers)
    assert all(not gateway.calls for gateway in world.gateways)


def test_all_gateways_agree_when_all_has_been_told() -> None:
    """After the last report, all gateways have the same sum of charges, and this sum equals the true service."""
    world = small([SimTenant("a", SHORT, rate_s=4.0), SimTenant("b", LONG, rate_s=1.0)], gateways=3)
    world.run(5.0)
    world.stop_arrivals()
    world.run(20.0)
    charged = [gateway.fair.order("m").statistics().charged for gateway in world.gateways if gateway.fair is not None]
    assert charged == pytest.approx([charged[0]] * 3)
    true = sum(one.service for one in world.observer.tenants.values())
    assert charged[0] == pytest.approx(true)


def test_agenda_is_in_order_and_does_not_go_back() -> None:
    """Actions run in the order of their times. Actions for the same time run in the order in which they were planned.
    An action for a past time runs at the current time."""
    event_queue, done = EventQueue(), list[str]()
    event_queue.at(2.0, lambda: done.append("late"))
    event_queue.at(1.0, lambda: done.append("first"))
    event_queue.at(1.0, lambda: event_queue.at(0.0, lambda: done.append("past")))
    event_queue.every(0.8, lambda: done.append("tick"))
    event_queue.run_until(2.0)
    assert done == ["tick", "first", "past", "tick", "late"]
    assert event_queue.now == 2.0


def test_tenants_that_cannot_be() -> None:
    """A simulated tenant must have lengths of prompts and outputs. It must have either a rate or a backlog; both or
    neither are refused."""
    for broken in ({}, {"rate_s": 1.0, "backlog": 1}):
        with pytest.raises(ValueError, match="exactly one"):
            SimTenant("a", SHORT, **broken)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lengths"):
        SimTenant("a", [], rate_s=1.0)


def test_made_up_lengths_and_prompts() -> None:
    """Made-up lengths are spread around their medians. The prompts of one tenant share a prefix and have the requested
    lengths."""
    rng = Random(1)
    some = made_up(rng, 1000, 100)
    assert 700 < sorted(x.prompt for x in some)[250] < 1400
    prompts, tenant = PromptMaker(rng, 100), SimTenant("a", SHORT, rate_s=1.0)
    one, two = prompts.make(tenant, 300), prompts.make(tenant, 400)
    assert (len(one), len(two), one[:256]) == (300, 400, two[:256])
    assert len(prompts.make(tenant, 1)) == 1
