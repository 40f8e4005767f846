"""Tests of the warm order: among one tenant's first sequences, the one with the greatest loss goes first. The loss is
the number of cached tokens that the sequence may lose by waiting. No other tenant waits longer, and no sequence
starves.
"""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.service_counters import QUANTUM
from cluster.policy.fairness.warm_order import MAX_CHOICES, MAX_OVERTAKEN, LossOf

WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}


def call(call_id: str, tenant: str = "a", tokens: int = 100, output: int = 10) -> WaitingSequence:
    """Return a waiting sequence."""
    return WaitingSequence(call_id, "m", tenant, tokens, None, "standard", 0.0, output_tokens=output)


def order_of(calls: list[WaitingSequence]) -> FairOrder:
    """Return a fair order in which these sequences wait."""
    order = FairOrder(weight_of=WEIGHTS.__getitem__)
    for each in calls:
        order.push(each)
    return order


def turn(order: FairOrder, loss_of: LossOf | None) -> WaitingSequence:
    """Mark the next sequence as taken, and return it."""
    head = order.head(loss_of)
    assert head is not None
    order.mark_taken(head.call_id)
    return head


def by_number(losses: list[int]) -> LossOf:
    """Return a function that gives the loss of each sequence, which decides the order. The loss of sequence number n is
    `losses[n % len(losses)]`."""
    return lambda waiting: losses[int(waiting.call_id) % len(losses)]


LOSSES = st.lists(st.integers(0, 5), min_size=1, max_size=30)
COSTS = st.tuples(st.integers(0, 3000), st.integers(0, 500))


@given(costs=st.dictionaries(st.sampled_from("abc"), COSTS, min_size=1), losses=LOSSES)
def test_calls_of_equal_cost_leave_the_turns_of_tenants_as_they_are(
    costs: dict[str, tuple[int, int]], losses: list[int]
) -> None:
    """If all sequences of a tenant cost the same, warm order and first come, first served give the tenants their turns
    in the same order. Warm order changes only which of a tenant's sequences goes first."""
    calls = [call(str(n * 3 + at), tenant, *costs[tenant]) for n in range(20) for at, tenant in enumerate(costs)]
    first_come, warm = order_of(calls), order_of(calls)
    for _ in calls:
        assert turn(first_come, None).tenant == turn(warm, by_number(losses)).tenant


@given(costs=st.lists(st.tuples(st.sampled_from("abc"), COSTS), min_size=3, max_size=40), losses=LOSSES)
def test_the_gap_between_backlogged_tenants_stays_within_one_charge(
    costs: list[tuple[str, tuple[int, int]]], losses: list[int]
) -> None:
    """While two tenants wait, their service counters differ by at most the largest charge divided by its tenant's
    weight, plus one QUANTUM. The same bound holds with first come, first served."""
    calls = [call(str(n), tenant, *cost) for n, (tenant, cost) in enumerate(costs)]
    largest = max((each.tokens + 2 * each.output_tokens) / WEIGHTS[each.tenant] for each in calls)
    for loss_of in (by_number(losses), None):
        order, waiting = order_of(calls), list(calls)
        while waiting:
            waiting.remove(turn(order, loss_of))
            counters = [order.counter(tenant) for tenant in {each.tenant for each in waiting}]
            assert max(counters, default=0.0) - min(counters, default=0.0) <= largest + QUANTUM


@given(costs=st.lists(st.tuples(st.sampled_from("abc"), COSTS), min_size=3, max_size=40), losses=LOSSES)
def test_another_tenants_sequence_waits_for_no_more_service(
    costs: list[tuple[str, tuple[int, int]]], losses: list[int]
) -> None:
    """While a tenant waits, warm order limits how much service another tenant can get between two consecutive turns of
    the waiting tenant. The limit is the same as with first come, first served.

    The limit is the sum of the cost of the first of the two turns, the largest cost of a call of the other tenant, and
    two times QUANTUM. Each cost is divided by the weight of its tenant.
    """
    calls = [call(str(n), tenant, *cost) for n, (tenant, cost) in enumerate(costs)]

    def charge(each: WaitingSequence) -> float:
        return (each.tokens + 2 * each.output_tokens) / WEIGHTS[each.tenant]

    order, left = order_of(calls), list(calls)
    turns: list[WaitingSequence] = []
    while left:
        turns.append(turn(order, by_number(losses)))
        left.remove(turns[-1])
    largest = {tenant: max((charge(each) for each in calls if each.tenant == tenant), default=0.0) for tenant in "abc"}
    for tenant in "abc":
        places = [number for number, each in enumerate(turns) if each.tenant == tenant]
        for start, end in pairwise(places):
            for other in set("abc") - {tenant}:
                served = sum(charge(each) for each in turns[start + 1 : end] if each.tenant == other)
                assert served <= charge(turns[start]) + largest[other] + 2 * QUANTUM


@given(losses=LOSSES, arrivals=st.lists(st.integers(0, 2), min_size=1, max_size=60), waiting=st.integers(1, 30))
def test_no_sequence_is_overtaken_for_ever(losses: list[int], arrivals: list[int], waiting: int) -> None:
    """No sequence is overtaken for ever. If p sequences of its tenant are ahead of a new sequence, it is chosen within
    the tenant's next (p + 1) * (MAX_OVERTAKEN + 1) turns, whatever arrives later."""
    order = order_of([call(str(number)) for number in range(waiting)])
    ahead = dict(zip(map(str, range(waiting)), range(waiting), strict=True))
    turns_left = {call_id: (place + 1) * (MAX_OVERTAKEN + 1) for call_id, place in ahead.items()}
    number = waiting
    for more in arrivals:
        for _ in range(more):
            turns_left[str(number)] = (len(turns_left) + 1) * (MAX_OVERTAKEN + 1)
            order.push(call(str(number)))
            number += 1
        if not turns_left:
            continue
        del turns_left[turn(order, by_number(losses)).call_id]
        for call_id in turns_left:
            turns_left[call_id] -= 1
            assert turns_left[call_id] > 0


def test_the_warmest_of_the_first_goes_first() -> None:
    """Among the first MAX_CHOICES sequences, the one with the greatest expected loss (cached tokens that an eviction
    would waste) is sent first. A sequence further back is not considered, even if its loss is greater."""
    order = order_of([call(str(number)) for number in range(MAX_CHOICES + 1)])
    losses = {"3": 700, "5": 900, str(MAX_CHOICES): 5000}
    sent = [turn(order, lambda waiting: losses.get(waiting.call_id, 0)).call_id for _ in range(4)]
    assert sent == ["5", str(MAX_CHOICES), "3", "0"]


@given(waiting=st.integers(1, 40), gone=st.sets(st.integers(0, 39)))
def test_few_lookups(waiting: int, gone: set[int]) -> None:
    """To choose the next sequence, the order computes the expected loss of at most MAX_CHOICES waiting sequences. If
    only one sequence waits, no loss is computed."""
    order = order_of([call(str(number)) for number in range(waiting)])
    left = [str(number) for number in range(waiting) if number not in gone]
    for number in sorted(gone):
        if number < waiting:
            order.remove(str(number))
    asked: list[str] = []

    def loss_of(each: WaitingSequence) -> int:
        asked.append(each.call_id)
        return 0

    head = order.head(loss_of)
    assert (head.call_id if head is not None else None) == (left[0] if left else None)
    assert asked == (left[:MAX_CHOICES] if len(left) > 1 else [])
