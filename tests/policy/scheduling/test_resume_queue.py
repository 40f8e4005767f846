"""Tests of the resume queue: the order of its sequences, the workers that hold their KV blocks, and the longest
waits.
"""

from __future__ import annotations

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.resume_queue import CACHED_WORKER_WAIT_S, ResumeQueue


def resuming(
    key: str,
    cached_on: str = "",
    *,
    rank: int = 0,
    deadline: float | None = None,
    silent_since: float | None = None,
    suspect: bool = False,
) -> ResumingSequence:
    """Return a sequence that resumes and has ten tokens."""
    entry = WaitingSequence(key, "m", "tenant", 5, deadline, "standard", 0.0, rank)
    return ResumingSequence(entry, 10, cached_on=cached_on, silent_since=silent_since, suspect=suspect)


def queue_of(*sequences: ResumingSequence, now: float = 0.0) -> ResumeQueue:
    """Return a resume queue with these sequences."""
    queue = ResumeQueue(30.0)
    for one in sequences:
        queue.add(one, now)
    return queue


def test_who_has_computed_them_is_counted() -> None:
    """The queue counts, for each worker, the sequences whose KV blocks the worker holds. A sequence that is added twice
    counts once."""
    a, b, c, d = (resuming(name, home) for name, home in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "")))
    queue = queue_of(a, b, c, d, a)
    assert queue.cached_counts("m") == {"x": 2, "y": 1}
    assert queue.waiting("m") == (4, 40)
    assert queue.remove("c")
    assert not queue.remove("c")
    assert queue.cached_counts("m") == {"x": 2}
    for key in "abd":
        queue.remove(key)
    assert (queue.cached_counts("m"), queue.models) == ({}, [])


def test_each_waits_for_its_own_worker_for_a_moment() -> None:
    """At first, a resumed sequence waits for the worker that holds its KV blocks. After CACHED_WORKER_WAIT_S, any
    worker may take it. If no worker holds its blocks, any worker may take it at once."""
    queue = queue_of(resuming("a", "x"), resuming("b"), now=5.0)
    assert [queue.waits_for(key, 5.0 + 0.9 * CACHED_WORKER_WAIT_S) for key in ("a", "b", "absent")] == ["x", "", ""]
    assert queue.waits_for("a", 5.0 + CACHED_WORKER_WAIT_S) == ""


def test_the_higher_class_first_and_who_waits_too_long_leaves() -> None:
    """The queue is ordered by class, then by arrival. A sequence expires at its deadline or after the maximum wait,
    whichever is earlier. The maximum wait is longer while the sequence's model starts."""
    low, high = resuming("a", rank=2), resuming("b", rank=0)
    late = resuming("c", rank=2, deadline=10.0)
    queue = queue_of(low, late, high)
    assert queue.in_order("m") == [high, low, late]
    assert queue.in_order("other") == ()
    assert queue.expired(10.0, lambda _: 100.0) == ["c"]
    assert queue.expired(29.0) == []
    assert set(queue.expired(30.0)) == {"a", "b"}
    assert queue.waiting("m") == (0, 0)


def test_no_wait_is_longer_than_twice_the_bound() -> None:
    """While a model starts, its sequences may wait longer than max_wait_s, but at most twice as long. (Formerly the
    whole start time was added, and a stream waited 49 s with max_wait_s 20.)"""
    queue = ResumeQueue(20.0)
    queue.add(resuming("a"), 0.0)
    assert queue.expired(39.9, lambda _: 500.0) == []
    assert queue.expired(40.0, lambda _: 500.0) == ["a"]
    queue.add(resuming("a"), 0.0)
    assert queue.expired(20.0) == ["a"], "nothing is added while a worker serves its model"


def test_a_worker_that_gave_no_token_is_no_new_beginning() -> None:
    """If a sequence loses a worker that has sent it no token, its waiting time continues and does not start again."""
    queue = ResumeQueue(20.0)
    queue.add(resuming("a"), 0.0)
    assert queue.remove("a")  # sent to a worker that is lost at once
    queue.add(resuming("a", silent_since=0.0), 15.0)
    assert queue.expired(19.9) == []
    assert queue.expired(20.0) == ["a"]


def test_an_acquitted_sequence_keeps_its_place() -> None:
    """A sequence is suspect if it may be the cause of worker losses. After `acquit` it is not suspect any more, and it
    keeps its place in the queue and its waiting time."""
    queue = queue_of(resuming("a", suspect=True), resuming("b"))
    queue.acquit("a")
    assert [(one.key, one.suspect) for one in queue.in_order("m")] == [("a", False), ("b", False)]
    assert set(queue.expired(30.0)) == {"a", "b"}
