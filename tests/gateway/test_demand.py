"""The demand tally. Counts of arrived sequences never decrease, and counts of waiting sequences match the queue. Calls
are judged by the SLO."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.demand import GROWTH_TOKENS, DemandTally, within_slo
from cluster.policy.fairness.order import WaitingSequence

CLASSES = {"interactive": 0, "batch": 2}


def sequence(
    number: int, priority_class: str = "batch", arrived: float = 0.0, deadline: float | None = None
) -> WaitingSequence:
    """Return a sequence with ten prompt tokens and seven expected output tokens. Three of the prompt tokens are
    expected to be cached."""
    rank = CLASSES[priority_class]
    return WaitingSequence(f"c{number}#0", "m", "t", 10, deadline, priority_class, arrived, rank, 3, 7)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.sampled_from(list(CLASSES))), max_size=80))
def test_counts_are_those_of_the_line(steps: list[tuple[bool, int, str]]) -> None:
    """The tally counts exactly the sequences that wait, whatever the order of arrivals and departures. A departure that
    is reported twice changes nothing."""
    tally, line, arrived = DemandTally(), dict[int, str](), dict.fromkeys(CLASSES, 0)
    for comes, number, name in steps:
        if comes and number not in line:
            tally.arrived(sequence(number, name))
            tally.enqueue(sequence(number, name))
            line[number] = name
            arrived[name] += 1
        elif not comes:
            tally.dequeue(f"c{number}#0")
            line.pop(number, None)
    by_class = {c.priority_class: c for c in tally.classes("m", 1.0, served=False)}
    for name in by_class:
        there = [n for n, c in line.items() if c == name]
        counts = by_class[name]
        assert (counts.queued_requests, counts.queued_tokens, counts.held_requests) == (
            len(there),
            10 * len(there),
            len(there),
        )
        assert (counts.arrived_requests, counts.arrived_prompt_tokens) == (arrived[name], 7 * arrived[name])
        assert (counts.expected_output_tokens, counts.rank) == (7 * arrived[name], CLASSES[name])
    assert {name for name, count in arrived.items() if count} == set(by_class)


LENGTHS = st.tuples(st.integers(1, 50), st.integers(0, 300), st.booleans())
"""Strategy for the lengths of a sequence: the expected output tokens, the actual output tokens, and whether the
sequence ever runs."""


@given(st.lists(LENGTHS, min_size=1, max_size=40), st.randoms())
def test_in_the_end_demand_is_what_was_generated(lengths: list[tuple[int, int, bool]], chance: random.Random) -> None:
    """The demand never decreases. After its end, a sequence that ran counts with its actual output, and a sequence that
    never ran counts with its expected output. If the expectation was too high, the excess is subtracted from later
    arrivals."""
    tally, expected_tokens = DemandTally(), 0

    def read_expected() -> int:
        nonlocal expected_tokens
        (counts,) = tally.classes("m", 0.0, served=True)
        assert counts.expected_output_tokens >= expected_tokens
        expected_tokens = counts.expected_output_tokens
        return expected_tokens

    for number, (foreseen, _, _) in enumerate(lengths):
        tally.arrived(replace(sequence(number), output_tokens=foreseen))
        read_expected()
    left = list(enumerate(lengths))
    chance.shuffle(left)
    for number, (_, came, ran) in left:
        for tokens in range(0, came if ran else 0, 40):
            tally.record_output(sequence(number), tokens)
            read_expected()
        for _ in range(2):  # the second call changes nothing
            tally.ended(sequence(number), came if ran else 0, ran)
            read_expected()
    known = sum(came if ran else foreseen for foreseen, came, ran in lengths)
    most = expected_tokens
    assert most >= known
    tally.arrived(replace(sequence(len(lengths)), output_tokens=most - known + 5))
    assert read_expected() == most + 5


def test_what_outgrows_its_guess_counts_while_it_runs() -> None:
    """If a running sequence has more output than was predicted, the excess is added to the demand in steps. Output of a
    sequence of another gateway is not counted."""
    tally = DemandTally()
    tally.arrived(sequence(1))
    for tokens, counted in ((7 + GROWTH_TOKENS - 1, 7), (7 + GROWTH_TOKENS, 7 + GROWTH_TOKENS), (200, 200)):
        tally.record_output(sequence(1), tokens)
        (counts,) = tally.classes("m", 0.0, served=True)
        assert counts.expected_output_tokens == counted
    tally.record_output(sequence(99), 10_000)
    tally.ended(sequence(99), 10_000, ran=True)
    (counts,) = tally.classes("m", 0.0, served=True)
    assert counts.expected_output_tokens == 200


def test_waits_and_deadlines() -> None:
    """The demand counts of a model include the longest wait and the nearest deadline of its queued sequences. If the
    model has a worker, `held_requests` is 0. A sequence that is queued twice counts once."""
    tally = DemandTally()
    for waiting in (
        sequence(1, arrived=1.0),
        sequence(2, arrived=2.0, deadline=9.0),
        sequence(2, arrived=2.0, deadline=9.0),
    ):
        tally.enqueue(waiting)
    (counts,) = tally.classes("m", 5.0, served=True)
    waits = (counts.queued_requests, counts.oldest_wait_s, counts.nearest_deadline_s, counts.held_requests)
    assert waits == (2, 4.0, 4.0, 0)
    tally.retain_models([])
    assert tally.classes("m", 5.0, served=True), "a sequence waits"
    tally.dequeue("c1#0")
    tally.dequeue("c2#0")
    tally.retain_models([])
    assert tally.classes("m", 5.0, served=True) == ()


def test_what_is_within_the_objectives() -> None:
    """A call is within the SLO if it meets both objectives. An objective of 0 is always met, and a call without a first
    token is never within the SLO."""
    assert within_slo(1.0, 0.05, 2.0, 0.1)
    assert not within_slo(3.0, 0.05, 2.0, 0.1)
    assert not within_slo(1.0, 0.2, 2.0, 0.1)
    assert within_slo(100.0, 100.0, 0.0, 0.0)
    assert not within_slo(None, 0.0, 0.0, 0.0)
