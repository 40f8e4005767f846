"""The line of those who go on: whose turn it is, who has computed them, and for how long each waits for that worker."""

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
    """What the line looks at of a gateway's Output."""

    key: str
    cached_on: str = ""
    tokens: int = 10
    call: _Call = field(default_factory=_Call)


def line(*sequences: Any, now: float = 0.0) -> ResumeQueue:
    """A line with these."""
    returning = ResumeQueue(30.0)
    for one in sequences:
        returning.add(one, now)
    return returning


def test_who_has_computed_them_is_counted() -> None:
    """As many as wait now for each worker; who comes twice is there once, who has no worker is nobody's."""
    a, b, c, d = (_Sequence(name, home) for name, home in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "")))
    returning = line(a, b, c, d, a)
    assert returning.cached_counts("m") == {"x": 2, "y": 1}
    assert returning.waiting("m") == (4, 40)
    assert returning.remove(c)  # type: ignore[arg-type]
    assert not returning.remove(c)  # type: ignore[arg-type]
    assert returning.cached_counts("m") == {"x": 2}
    for one in (a, b, d):
        returning.remove(one)  # type: ignore[arg-type]
    assert (returning.cached_counts("m"), returning.models) == ({}, [])


def test_each_waits_for_its_own_worker_for_a_moment() -> None:
    """Then it may go anywhere; one that has no worker, or does not wait, may at once."""
    home, none, away = _Sequence("a", "x"), _Sequence("b"), _Sequence("c", "x")
    returning = line(home, none, now=5.0)
    asked: list[Any] = [home, none, away]
    assert [returning.waits_for(one, 5.0 + 0.9 * HOME_S) for one in asked] == ["x", "", ""]
    assert returning.waits_for(asked[0], 5.0 + HOME_S) == ""


def test_the_higher_class_first_and_who_waits_too_long_leaves() -> None:
    """First come, first served within a class; by its own deadline sooner, where its model starts later."""
    low, high = _Sequence("a", call=_Call(rank=2)), _Sequence("b", call=_Call(rank=0))
    late = _Sequence("c", call=_Call(rank=2, deadline=10.0))
    returning = line(low, late, high)
    order: list[Any] = [high, low, late]
    assert returning.in_order("m") == order
    assert returning.in_order("other") == ()
    assert returning.expired(10.0, lambda _: 100.0) == order[2:]
    assert returning.expired(29.0) == []
    assert set(map(id, returning.expired(30.0))) == set(map(id, order[:2]))
    assert returning.waiting("m") == (0, 0)


def test_no_wait_is_longer_than_twice_the_bound() -> None:
    """A stream waited 49 s where max_wait_s was 20: what a start takes was added, whatever that was."""
    returning = ResumeQueue(20.0)
    waits: Any = _Sequence("a")
    returning.add(waits, 0.0)
    assert returning.expired(39.9, lambda _: 500.0) == []
    assert returning.expired(40.0, lambda _: 500.0) == [waits]
    returning.add(waits, 0.0)
    assert returning.expired(20.0) == [waits], "nothing is added while a worker serves its model"


def test_a_worker_that_gave_no_token_is_no_new_beginning() -> None:
    """Each worker that was lost before it had given a token began the wait anew."""
    returning = ResumeQueue(20.0)
    waits: Any = _Sequence("a")
    returning.add(waits, 0.0)
    assert returning.remove(waits)  # to a worker that is lost at once
    returning.add(waits, 15.0, silent_since=0.0)
    assert returning.expired(19.9) == []
    assert returning.expired(20.0) == [waits]
