"""The resume queue: the order of sequences, the workers that hold KV blocks, and the longest waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.gateway.scheduling.resume_queue import HOME_S, ResumeQueue


@dataclass
class _Call:
    model: str = "m"
    rank: int = 0
    deadline: float | None = None


@dataclass
class _Sequence:
    """A stand-in for a sequence, with the attributes that the queue reads."""

    key: str
    cached_on: str = ""
    tokens: int = 10
    call: _Call = field(default_factory=_Call)


def queue_of(*sequences: Any, now: float = 0.0) -> ResumeQueue:
    """Return a resume queue with these sequences."""
    queue = ResumeQueue(30.0)
    for one in sequences:
        queue.add(one, now)
    return queue


def test_who_has_computed_them_is_counted() -> None:
    """The queue counts the sequences cached on each worker, and a sequence that is added twice counts once."""
    a, b, c, d = (_Sequence(name, home) for name, home in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "")))
    queue = queue_of(a, b, c, d, a)
    assert queue.cached_counts("m") == {"x": 2, "y": 1}
    assert queue.waiting("m") == (4, 40)
    assert queue.remove(c)  # type: ignore[arg-type]
    assert not queue.remove(c)  # type: ignore[arg-type]
    assert queue.cached_counts("m") == {"x": 2}
    for one in (a, b, d):
        queue.remove(one)  # type: ignore[arg-type]
    assert (queue.cached_counts("m"), queue.models) == ({}, [])


def test_each_waits_for_its_own_worker_for_a_moment() -> None:
    """A sequence waits a moment for the worker that holds its KV blocks, then for any worker. A sequence whose KV
    blocks no worker holds waits for any worker from the beginning."""
    home, none, away = _Sequence("a", "x"), _Sequence("b"), _Sequence("c", "x")
    queue = queue_of(home, none, now=5.0)
    asked: list[Any] = [home, none, away]
    assert [queue.waits_for(one, 5.0 + 0.9 * HOME_S) for one in asked] == ["x", "", ""]
    assert queue.waits_for(asked[0], 5.0 + HOME_S) == ""


def test_the_higher_class_first_and_who_waits_too_long_leaves() -> None:
    """The queue is ordered by class, then first come first served. A sequence expires after the longest wait, earlier
    at its deadline, and later while its model starts."""
    low, high = _Sequence("a", call=_Call(rank=2)), _Sequence("b", call=_Call(rank=0))
    late = _Sequence("c", call=_Call(rank=2, deadline=10.0))
    queue = queue_of(low, late, high)
    order: list[Any] = [high, low, late]
    assert queue.in_order("m") == order
    assert queue.in_order("other") == ()
    assert queue.expired(10.0, lambda _: 100.0) == order[2:]
    assert queue.expired(29.0) == []
    assert set(map(id, queue.expired(30.0))) == set(map(id, order[:2]))
    assert queue.waiting("m") == (0, 0)


def test_no_wait_is_longer_than_twice_the_bound() -> None:
    """No wait exceeds twice the bound. Formerly the whole start time was added, and a stream waited 49 s with
    max_wait_s 20."""
    queue = ResumeQueue(20.0)
    waits: Any = _Sequence("a")
    queue.add(waits, 0.0)
    assert queue.expired(39.9, lambda _: 500.0) == []
    assert queue.expired(40.0, lambda _: 500.0) == [waits]
    queue.add(waits, 0.0)
    assert queue.expired(20.0) == [waits], "nothing is added while a worker serves its model"


def test_a_worker_that_gave_no_token_is_no_new_beginning() -> None:
    """The wait of a sequence does not restart when a worker is lost before that worker's first token."""
    queue = ResumeQueue(20.0)
    waits: Any = _Sequence("a")
    queue.add(waits, 0.0)
    assert queue.remove(waits)  # sent to a worker that is lost at once
    queue.add(waits, 15.0, silent_since=0.0)
    assert queue.expired(19.9) == []
    assert queue.expired(20.0) == [waits]
