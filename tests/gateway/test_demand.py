"""The gateway's tally: what has come only grows, what waits is what stands in line, and how calls are judged."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.demand import Tally, within_slo
from cluster.tenancy.order import Waiting

CLASSES = {"interactive": 0, "batch": 2}


def one(number: int, priority_class: str = "batch", arrived: float = 0.0, deadline: float | None = None) -> Waiting:
    """Ten tokens, three of them expected in a cache; seven to come."""
    rank = CLASSES[priority_class]
    return Waiting(f"c{number}#0", "m", "t", 10, deadline, priority_class, arrived, rank, 3, 7)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.sampled_from(list(CLASSES))), max_size=80))
def test_counts_are_those_of_the_line(steps: list[tuple[bool, int, str]]) -> None:
    """Whatever comes, goes, and goes twice."""
    tally, line, arrived = Tally(), dict[int, str](), dict.fromkeys(CLASSES, 0)
    for comes, number, name in steps:
        if comes and number not in line:
            tally.arrived(one(number, name))
            tally.waits(one(number, name))
            line[number] = name
            arrived[name] += 1
        elif not comes:
            tally.waits_no_more(f"c{number}#0")
            line.pop(number, None)
    told = {c.priority_class: c for c in tally.classes("m", 1.0, served=False)}
    for name in told:
        there = [n for n, c in line.items() if c == name]
        counts = told[name]
        assert (counts.queued_requests, counts.queued_tokens, counts.held_requests) == (
            len(there),
            10 * len(there),
            len(there),
        )
        assert (counts.arrived_requests, counts.arrived_prompt_tokens) == (arrived[name], 7 * arrived[name])
        assert (counts.expected_output_tokens, counts.rank) == (7 * arrived[name], CLASSES[name])
    assert {name for name, count in arrived.items() if count} == set(told)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 200)), min_size=1, max_size=40), st.randoms())
def test_in_the_end_demand_is_what_was_generated(lengths: list[tuple[int, int]], chance: random.Random) -> None:
    """Whatever was foreseen: at every moment no less than before, no less than what is known, and once more has come
    than was foreseen too much, exactly that."""
    tally, told, known, most = Tally(), 0, 0, 0
    steps = [(one(n), foreseen) for n, (foreseen, _) in enumerate(lengths)]
    ends = [(one(n), came - foreseen) for n, (foreseen, came) in enumerate(lengths)]
    chance.shuffle(ends)
    for number, (waiting, more) in enumerate([*steps, *ends]):
        if number < len(steps):
            tally.arrived(replace(waiting, output_tokens=more))
        else:
            tally.foreseen(waiting, more)
        known += more
        most = max(most, known)
        (counts,) = tally.classes("m", 0.0, served=True)
        assert counts.expected_output_tokens == most >= told
        told = counts.expected_output_tokens
    assert known == sum(came for _, came in lengths)
    tally.arrived(replace(one(0), output_tokens=most - known + 5))
    (counts,) = tally.classes("m", 0.0, served=True)
    assert counts.expected_output_tokens == most + 5


def test_waits_and_deadlines() -> None:
    """The oldest and the nearest; nobody is held where somebody serves; put back, it stands there once."""
    tally = Tally()
    for waiting in (one(1, arrived=1.0), one(2, arrived=2.0, deadline=9.0), one(2, arrived=2.0, deadline=9.0)):
        tally.waits(waiting)
    (told,) = tally.classes("m", 5.0, served=True)
    assert (told.queued_requests, told.oldest_wait_s, told.nearest_deadline_s, told.held_requests) == (2, 4.0, 4.0, 0)
    tally.keep([])
    assert tally.classes("m", 5.0, served=True), "somebody waits"
    tally.waits_no_more("c1#0")
    tally.waits_no_more("c2#0")
    tally.keep([])
    assert tally.classes("m", 5.0, served=True) == ()


def test_what_is_within_the_objectives() -> None:
    """Both must hold; nothing asked is always met; a first token that never came never is."""
    assert within_slo(1.0, 0.05, 2.0, 0.1)
    assert not within_slo(3.0, 0.05, 2.0, 0.1)
    assert not within_slo(1.0, 0.2, 2.0, 0.1)
    assert within_slo(100.0, 100.0, 0.0, 0.0)
    assert not within_slo(None, 0.0, 0.0, 0.0)
