"""Tests of WorkersView, the view of the workers while a batch of resumed sequences is routed."""

from __future__ import annotations

from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.workers_view import MAX_SAMPLE, WorkersView
from tests.policy.scheduling.policy_cases import KEYS, Fleet, entry


def test_only_a_refreshed_worker_is_read_again() -> None:
    """A change of a worker is visible only after `refresh` of this worker. A worker that has left is then no longer
    listed."""
    fleet = Fleet()
    for name in ("w1", "w2", "w3"):
        fleet.add(name)
    view = WorkersView(fleet, "m", 0.0)
    first, second, third = view.all()
    for worker in (first, second):
        fleet.spend(worker.worker_id)
    del fleet.workers["w3"]
    view.refresh(first, is_suspect=True)
    assert [worker.free_sequences for worker in view.all()] == [0, 1, 1]
    view.refresh(third, is_suspect=False)
    assert [worker.worker_id for worker in view.all()] == ["w1", "w2"]
    assert (view.runs_suspect(first), view.runs_suspect(second)) == (True, False)


def test_a_sample_is_small_and_suitable() -> None:
    """A sample of workers for a resuming sequence has at most MAX_SAMPLE workers, all with free capacity. The same
    sequence always gets the same sample."""
    fleet = Fleet()
    for number in range(100):
        fleet.add(f"w{number}", free=number % 2)
    view = WorkersView(fleet, "m", 0.0)
    sequence = ResumingSequence(entry("a"), 12, KEYS[0])
    sample = view.sample(sequence, 0.0)
    assert len(sample) == MAX_SAMPLE
    assert all(worker.free_sequences for worker in sample)
    assert view.sample(sequence, 0.0) == sample
