"""The queue of jobs that wait for a helper."""

from __future__ import annotations

from cluster.gateway.helpers.helper_queue import HelperQueue


async def test_tenants_take_turns() -> None:
    """A job that arrives after many jobs of another tenant is the second job to run."""
    queue = HelperQueue()
    loud = [queue.add("loud") for _ in range(10)]
    quiet = queue.add("quiet")
    order = [queue.pop() for _ in range(11)]
    assert order == [loud[0], quiet, *loud[1:]]
    assert queue.pop() is None


async def test_cancelled_jobs_are_skipped() -> None:
    """A job whose caller was cancelled gets no helper."""
    queue = HelperQueue()
    cancelled, kept = queue.add("a"), queue.add("a")
    cancelled.cancel()
    assert queue.pop() is kept
    assert queue.pop() is None
