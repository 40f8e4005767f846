"""Loads of adapters into an engine's memory, tested without a worker."""

from __future__ import annotations

import asyncio

import pytest

from cluster.policy.adapters.memory import AdapterMemory
from cluster.worker.adapters.loads import AdapterLoads
from cluster.worker.adapters.reports import AdapterReports
from cluster.worker.adapters.tasks import AdapterTasks
from tests.worker.adapters.test_worker_adapters import Engine


@pytest.mark.timeout(60)  # not asyncio's: a request that waits for an ended load blocks the event loop
async def test_a_request_does_not_wait_for_a_load_that_has_ended() -> None:
    """A request needs an adapter whose load has just ended and which is being removed to make room for another adapter.
    The adapter is loaded again, and the request does not wait for the ended load."""
    engine, tasks = Engine(1), AdapterTasks()
    engine.gates["a"] = asyncio.Event()
    loads = AdapterLoads(
        engine,
        AdapterMemory(1, 1),
        AdapterReports(list),
        tasks,
        report_dead=lambda dead: pytest.fail(str(dead)),
        mark_corrupting=lambda digest, reason: pytest.fail(f"{digest}: {reason}"),
        mark_refused=lambda digest, reason: pytest.fail(f"{digest}: {reason}"),
    )
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
