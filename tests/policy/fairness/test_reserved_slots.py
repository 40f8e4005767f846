"""Tests of reserved slots: a few slots that are kept free for guests (tenants that send little). Only a tenant that
always has sequences waiting must leave these slots free."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.fairness.fair_queue import IDLE_S, FairOrder
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.reserved_slots import GUEST_S, KEPT_MOST, KEPT_OF, ReservedSlots

RUNNING = KEPT_OF * 2


def call(call_id: str, tenant: str, rank: int = 0) -> WaitingSequence:
    """Return a waiting sequence."""
    return WaitingSequence(call_id, "m", tenant, 100, None, "standard", 0.0, rank)


def flooded(guest_rank: int = 0, loud_rank: int = 0) -> tuple[FairOrder, WaitingSequence]:
    """Return a fair order with a busy tenant, `loud`, and a waiting sequence of `loud`.

    The sequences of `loud` arrived at time 0, and RUNNING of them were sent to workers. At 5 s, one call of the tenant
    `guest` and then one more sequence of `loud` were sent to workers.
    """
    order = FairOrder()
    head = call("head", "loud", loud_rank)
    order.push(head, 0.0)
    for number in range(RUNNING):
        order.push(call(f"loud-{number}", "loud", loud_rank), 0.0)
        order.mark_taken(f"loud-{number}", 0.0)
    order.push(call("guest", "guest", guest_rank), 5.0)
    order.mark_taken("guest", 5.0)
    order.push(call("one-more", "loud", loud_rank), 5.0)
    order.mark_taken("one-more", 5.0)
    order.sweep(5.1)
    return order, head


def test_places_are_kept_from_who_always_waits() -> None:
    """A tenant that always has waiting calls must leave the reserved slots free while other tenants still send calls.
    Once no other tenant has sent a call for GUEST_S seconds, it may use all slots."""
    order, head = flooded()
    assert order.slots_to_keep_free(head) == RUNNING // KEPT_OF
    assert order.slots_to_keep_free(head, beside=RUNNING) == 0, "what waits beside the queue fills no slot"
    order.sweep(5.0 + IDLE_S + GUEST_S + 1)
    assert order.slots_to_keep_free(head) == 0


def test_nothing_is_kept_from_guests() -> None:
    """A guest is a tenant that has had no more than its share. A new call of a guest may take any slot, even a reserved
    one. So may a call that lost its worker."""
    order, _ = flooded()
    second = call("again", "guest")
    order.push(second, 6.0)
    assert order.slots_to_keep_free(second) == 0
    lost = call("loud-0", "loud")
    order.put_back(lost)
    assert order.slots_to_keep_free(lost) == 0


def test_a_lower_class_is_no_guest_of_a_higher_one() -> None:
    """A call leaves slots free only for tenants that send calls of the same or a higher class. So interactive calls
    leave no slot free for batch calls, but batch calls leave slots free for interactive calls."""
    order, head = flooded(guest_rank=2, loud_rank=0)
    assert order.slots_to_keep_free(head) == 0
    order, head = flooded(guest_rank=0, loud_rank=2)
    assert order.slots_to_keep_free(head) > 0


def test_two_who_flood_are_nobodys_guests() -> None:
    """If all tenants always have sequences waiting, no slot is reserved, and all capacity is used."""
    order = FairOrder()
    for tenant in ("one", "other"):
        for number in range(RUNNING):
            order.push(call(f"{tenant}-{number}", tenant), 0.0)
    for number in range(RUNNING):
        head_now = order.head()
        assert head_now is not None
        order.mark_taken(head_now.call_id, 0.1 * number)
        order.sweep(0.1 * number)
    last = order.head()
    assert last is not None
    assert order.slots_to_keep_free(last) == 0


@given(
    st.integers(0, 100_000), st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), max_size=5), st.floats(0, 200)
)
def test_never_more_than_its_part(filled: int, seen: list[tuple[int, float]], now: float) -> None:
    """The number of reserved slots is at most the number of running calls divided by KEPT_OF, and at most KEPT_MOST."""
    guests = ReservedSlots()
    for rank, at in seen:
        guests.note_guest(rank, at)
    kept = guests.reserved(3, filled, now)
    assert 0 <= kept <= min(filled / KEPT_OF, KEPT_MOST)
    about = any(rank <= 3 and now < at + GUEST_S for rank, at in seen)
    assert kept == 0 or about
