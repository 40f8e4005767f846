"""The queue of jobs in which tenants take turns."""

from __future__ import annotations

from cluster.gateway.helpers.job_queue import JobQueue


async def test_tenants_take_turns() -> None:
    """A job that arrives after many jobs of another tenant is the second job to run."""
    queue = JobQueue[str]()
    loud = [queue.add("loud") for _ in range(10)]
    quiet = queue.add("quiet")
    order = [queue.pop() for _ in range(11)]
    assert order == [loud[0], quiet, *loud[1:]]
    assert queue.pop() is None


async def test_cancelled_jobs_are_skipped() -> None:
    """A job whose caller was cancelled gets no helper."""
    queue = JobQueue[str]()
    cancelled, kept = queue.add("a"), queue.add("a")
    cancelled.cancel()
    assert queue.pop() is kept
    assert queue.pop() is None
