"""Loads of adapters into an engine's memory, tested without a worker."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.api.ports import EngineRefused
from cluster.policy.adapters.memory import AdapterMemory
from cluster.worker.adapters.loads import AdapterLoads
from cluster.worker.adapters.reports import AdapterReports
from cluster.worker.adapters.tasks import AdapterTasks
from tests.support.cluster import until
from tests.worker.adapters.test_worker_adapters import Engine


def loads_of(engine: Engine, tasks: AdapterTasks, capacity: int = 1, **changes: Any) -> AdapterLoads:
    """Return the loads of an engine whose memory holds `capacity` adapters. `changes`: further arguments of
    AdapterLoads. The test fails if the engine dies, or if an adapter corrupts it or is refused."""

    def fail(*what: object) -> None:
        pytest.fail(f"unexpected: {what}")

    reports = {"report_dead": fail, "mark_corrupting": fail, "mark_refused": fail}
    return AdapterLoads(engine, AdapterMemory(1, capacity), AdapterReports(list), tasks, **(reports | changes))


@pytest.mark.timeout(60)  # not asyncio's: a request that waits for an ended load blocks the event loop
async def test_a_request_does_not_wait_for_a_load_that_has_ended() -> None:
    """A request needs an adapter whose load has just ended and which is being removed to make room for another adapter.
    The adapter is loaded again, and the request does not wait for the ended load."""
    engine, tasks = Engine(1), AdapterTasks()
    engine.gates["a"] = asyncio.Event()
    loads = loads_of(engine, tasks)
    loads.set_wanted({"a": "/a", "b": "/b"}, frozenset(), {"a", "b"})
    first = loads.load("a")
    await asyncio.sleep(0)
    engine.gates["a"].set()
    await asyncio.sleep(0)  # now the load ends in the next iteration of the event loop
    loads.load("b")
    request = asyncio.create_task(loads.hold("a"))
    await asyncio.wait_for(request, 30)
    assert first.done()
    assert engine.loaded == {"a"}
    loads.release("a")
    await tasks.cancel()


@pytest.mark.timeout(60)
async def test_an_unwanted_adapter_no_longer_takes_the_place_of_another() -> None:
    """An adapter in use is closed to make room for an overdue one. When the overdue one is no longer wanted, its load
    is refused, and the closed adapter takes requests again and stays in memory."""
    engine, tasks = Engine(1), AdapterTasks()
    loads = loads_of(engine, tasks, mark_refused=lambda digest, reason: None, hold_s=0.01)
    loads.set_wanted({"a": "/a", "b": "/b"}, frozenset(), {"a", "b"})
    await loads.hold("a")
    with pytest.raises(EngineRefused, match="in use"):
        await loads.hold("b")
    load = loads.load("b")
    await until(lambda: bool(loads.why_waiting("a")), "a is closed")
    loads.set_wanted({"a": "/a"}, frozenset(), {"a"})
    with pytest.raises(EngineRefused, match="'b' is no longer wanted"):
        await asyncio.wait_for(load, 30)
    await loads.hold("a")
    loads.release("a")
    loads.release("a")
    assert engine.loaded == {"a"}
    await tasks.cancel()


@pytest.mark.timeout(60)
async def test_an_overdue_adapter_stays_until_its_requests_arrive() -> None:
    """Two adapters are overdue. The first to be loaded stays in memory until its requests can have arrived, although
    none uses it yet, and takes requests meanwhile."""
    engine, tasks = Engine(1), AdapterTasks()
    loads = loads_of(engine, tasks, mark_refused=lambda digest, reason: None, hold_s=0.01)
    loads.set_wanted({digest: f"/{digest}" for digest in "abc"}, frozenset(), set("abc"))
    await loads.hold("a")
    for digest in "bc":
        with pytest.raises(EngineRefused, match="in use"):
            await loads.hold(digest)
    load, loads._hold_s = loads.load("b"), 60.0
    loads.release("a")
    await load
    for _ in range(50):
        await asyncio.sleep(0)
    assert engine.loaded == {"b"}
    await loads.hold("b")
    loads.release("b")
    loads._end_spare("b")
    await until(lambda: engine.loaded == {"c"}, "the other adapter gets its turn")
    await tasks.cancel()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pinned", [frozenset[str](), frozenset({"b"})])
async def test_a_load_without_requests_gets_its_turn(pinned: frozenset[str]) -> None:
    """A load that no request waits for closes an adapter that is in use once it has waited as long as a request may
    wait, whether or not its own adapter is pinned."""
    engine, tasks = Engine(1), AdapterTasks()
    loads = loads_of(engine, tasks, hold_s=0.01)
    loads.set_wanted({"a": "/a", "b": "/b"}, pinned, {"a", "b"})
    await loads.hold("a")
    engine.in_use.append("a")
    load = loads.load("b")
    await until(lambda: bool(loads.why_waiting("a")), "a is closed")
    with pytest.raises(EngineRefused, match="in use"):
        await loads.hold("a")
    assert engine.loaded == {"a"}, "what is in use is not dropped"
    engine.in_use.clear()
    loads.release("a")
    await load
    assert engine.loaded == {"b"}
    await until(lambda: not any(map(loads.why_waiting, "ab")), "both take requests again")
    await tasks.cancel()


@pytest.mark.timeout(60)
async def test_a_load_makes_room_if_a_load_behind_it_is_overdue() -> None:
    """A load that waits for memory closes an adapter if another load, which waits for this one, is overdue."""
    engine, tasks = Engine(1), AdapterTasks()
    loads = loads_of(engine, tasks, hold_s=60.0)
    loads.set_wanted({digest: f"/{digest}" for digest in "abc"}, frozenset(), set("abc"))
    await loads.hold("a")
    first, loads._hold_s = loads.load("b"), 0.01
    with pytest.raises(EngineRefused, match="in use"):
        await loads.hold("c")
    await until(lambda: bool(loads.why_waiting("a")), "a is closed")
    loads.release("a")
    await first
    await until(lambda: engine.loaded == {"c"}, "the overdue adapter gets its turn")
    await tasks.cancel()


@pytest.mark.timeout(60)
async def test_a_closed_adapter_that_is_pinned_takes_requests_again() -> None:
    """An adapter is closed to make room for an overdue one, and is then pinned. It takes requests again, and another
    adapter makes room instead."""
    engine, tasks = Engine(2), AdapterTasks()
    loads = loads_of(engine, tasks, 2, hold_s=0.01)
    folders = {digest: f"/{digest}" for digest in "abc"}
    loads.set_wanted(folders, frozenset(), set("abc"))
    for digest in "ab":
        await loads.hold(digest)
    with pytest.raises(EngineRefused, match="in use"):
        await loads.hold("c")
    load = loads.load("c")
    await until(lambda: bool(loads.why_waiting("a")), "a is closed")
    loads.set_wanted(folders, frozenset({"a"}), set("abc"))
    await until(lambda: bool(loads.why_waiting("b")), "b is closed instead")
    await loads.hold("a")
    loads.release("b")
    await load
    assert engine.loaded == {"a", "c"}
    await tasks.cancel()
