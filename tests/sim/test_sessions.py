"""Tests of the simulated agents. Equal configurations give equal runs.

Warm order may send a sequence whose prompt is cached before older sequences of the same tenant. With warm order, more
prompt tokens are found in caches, and service stays fair between tenants.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from loadtests.sim.sessions import SessionsConfig, SessionTenant, SessionWorld

pytestmark = pytest.mark.slow

TENANTS = [SessionTenant("a", 22, 1.0, 5.0), SessionTenant("b", 15, 2.0, 10.0), SessionTenant("c", 12, 4.0, 15.0)]
SMALL = SessionsConfig(TENANTS, turns=18, start_s=60.0, workers=2, kv_blocks=1000)


@cache
def run(warm: bool, seed: int = 1) -> SessionWorld:
    """Run a small cluster until all sessions have ended; return it."""
    return SessionWorld(replace(SMALL, warm=warm, seed=seed)).run()


def test_equal_seeds_equal_runs() -> None:
    """Runs with equal seeds are equal, and runs with different seeds differ."""

    def history(world: SessionWorld) -> list[tuple[str, int, float]]:
        return [(turn.waiting.call_id, turn.worker, turn.first) for turn in world.turns]

    again = SessionWorld(replace(SMALL, warm=True)).run()
    assert history(run(True)) == history(again)
    assert history(run(True)) != history(run(True, seed=2))


@pytest.mark.parametrize("warm", [False, True])
def test_every_turn_is_served(warm: bool) -> None:
    """All sessions end, and no worker ever holds more blocks or calls than its maximum."""
    world = run(warm)
    assert len(world.turns) == sum(tenant.sessions for tenant in TENANTS) * SMALL.turns
    assert all(worker.running == 0 and worker.free_blocks == SMALL.kv_blocks for worker in world.workers)


def test_warm_order_finds_more_and_stays_fair() -> None:
    """With warm order, more prompt tokens are found in caches and first tokens arrive earlier. The difference in
    service between tenants stays within the bound of fair queueing."""
    cold, warm = run(False), run(True)
    assert warm.hit_rate() > 1.05 * cold.hit_rate()
    assert warm.ttft_s(0.9) < cold.ttft_s(0.9)
    assert max(cold.gap(), warm.gap()) <= 1.0
