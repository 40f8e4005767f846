"""Threads for long texts: tenants take turns, and cancelled jobs leave no thread unused."""

from __future__ import annotations

import asyncio
import threading

from cluster.gateway.text.encoding.thread_turns import ThreadTurns


async def test_a_tenants_backlog_delays_another_tenant_by_one_job() -> None:
    """While the only thread works on a tenant's first job, many jobs of this tenant and one of another tenant come. The
    other tenant's job is the second or third to run."""
    turns, order, gate = ThreadTurns(1), list[str](), threading.Event()

    def job(name: str) -> None:
        gate.wait(30)
        order.append(name)

    loud = [asyncio.ensure_future(turns.run("loud", lambda: job("loud"))) for _ in range(20)]
    await asyncio.sleep(0)
    quiet = asyncio.ensure_future(turns.run("quiet", lambda: job("quiet")))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*loud, quiet)
    assert order.index("quiet") <= 2


async def test_cancelled_jobs_pass_their_turns_on() -> None:
    """Jobs that are cancelled while they wait, run or have just got their turn, hold up no other job."""
    turns, gate = ThreadTurns(1), threading.Event()
    running = asyncio.ensure_future(turns.run("a", lambda: gate.wait(30)))
    waiting = [asyncio.ensure_future(turns.run("a", lambda: 1)) for _ in range(5)]
    await asyncio.sleep(0)
    for task in waiting[:3]:
        task.cancel()
    gate.set()
    assert await running
    assert await asyncio.gather(*waiting[3:]) == [1, 1]
    assert await asyncio.wait_for(turns.run("b", lambda: 2), 30) == 2
