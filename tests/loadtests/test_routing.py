"""Tests of the load-test scenario `routing`: its parts run in small simulations, and its figures mean what their names
say."""

from __future__ import annotations

import importlib

import pytest

from loadtests import traces
from loadtests.__main__ import SCENARIOS
from loadtests.routing import agents, azure, burst, gateways, mooncake, new_gateway, slow
from loadtests.routing.outcome import variation
from loadtests.routing.policies import OURS
from loadtests.routing.sessions import AgentTenant, SessionsConfig
from loadtests.scenarios import routing

has_traces = pytest.mark.skipif(not traces.DEFAULT_FOLDER.is_dir(), reason="optional data: the traces are absent")


def test_every_part_has_rows() -> None:
    """The scenario is registered, and each of its parts has rows with bounds."""
    assert "routing" in SCENARIOS
    for name in routing.PARTS:
        assert importlib.import_module(f"loadtests.routing.{name}").ROWS


@pytest.mark.parametrize("holders", [1, 8])
def test_a_burst_is_sent_whole(holders: int) -> None:
    """All calls of a burst are sent within five seconds and spread evenly, whether one worker holds the prefix or all
    do."""
    loads = burst.loads(OURS, holders, 1)
    assert sum(loads) == burst.CALLS
    assert variation(loads) <= 0.1 if holders == 8 else max(loads) <= 1.5 * sum(loads) / 8


def test_small_agent_cell() -> None:
    """In a small simulation with agents of three tenants, more than 80 % of the prompt tokens are found in caches.

    The service of any two tenants differs by at most one unit. The unit is the larger of two costs: the cost of the
    longest prompt, and the cost of the most tokens that a worker held at once.
    """
    tenants = tuple(AgentTenant(name, weight, 3, 1.0) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 3.0)))
    outcome, gap = agents.run(OURS, 1, SessionsConfig(tenants, turns=4, start_s=10.0), blocks=400)
    assert outcome.calls >= 36
    assert outcome.hits > 0.8
    assert 0 <= gap <= 1


def test_time_until_hits_are_back() -> None:
    """A new gateway counts as recovered once it knows enough of the tokens that workers have cached. `back_after_s`
    returns the time until then."""
    calls = [new_gateway.Known(number / 10, 100, 100 if number >= 30 else 0) for number in range(1200)]
    assert 0 < new_gateway.back_after_s(calls) <= 3
    assert new_gateway.back_after_s(calls[30:]) == 0
    assert new_gateway.back_after_s(calls[:20]) == pytest.approx(2, abs=0.1)


@has_traces
@pytest.mark.slow
def test_small_cells_of_the_traces() -> None:
    """The beginning of each trace is replayed. With Mooncake's trace, the number of cached tokens under our policy is
    at least nine tenths of the number in a pooled cache. With Azure's trace, whose prompts share nothing, no tokens are
    cached."""
    ours, theirs = (mooncake.run(policy, 600, 1, most=300) for policy in (OURS, "round robin"))
    assert ours.cached >= 0.9 * ours.in_pool
    assert ours.cached > theirs.cached
    assert ours.mean_s < theirs.mean_s
    assert not azure.run(OURS, 1, most=200).cached
    outcome, twice = slow.run(slow.NEITHER, 1, most=200)
    assert outcome.calls == 200
    assert not twice


@has_traces
@pytest.mark.slow
def test_more_gateways_find_as_much() -> None:
    """Four gateways, each with a quarter of the workers' credit, find nearly as many cached tokens as one gateway,
    because a call waits for the worker that holds its prompt."""
    one, four = (gateways.run(number, 1, most=1200).hit_rate for number in (1, 4))
    assert four > 0.93 * one > 0.1
