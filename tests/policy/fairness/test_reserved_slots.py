"""Tests of reserved slots. A few slots are kept free for guests: tenants that send little. They are kept free only by
tenants that always have sequences waiting.
"""

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
    """Return a fair order, and a waiting sequence of a loud tenant, which has had sequences waiting since time 0.

    The loud tenant has RUNNING running calls. A guest's call came and was served at 5 s; the loud tenant has then had
    another turn.
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
    """After a guest was seen, the loud tenant leaves the reserved slots free until no guest has come for GUEST_S."""
    order, head = flooded()
    assert order.slots_to_keep_free(head) == RUNNING // KEPT_OF
    order.sweep(5.0 + IDLE_S + GUEST_S + 1)
    assert order.slots_to_keep_free(head) == 0


def test_nothing_is_kept_from_guests() -> None:
    """A guest's new call may take any slot. A call that lost its worker may take any slot, too."""
    order, _ = flooded()
    second = call("again", "guest")
    order.push(second, 6.0)
    assert order.slots_to_keep_free(second) == 0
    lost = call("loud-0", "loud")
    order.put_back(lost)
    assert order.slots_to_keep_free(lost) == 0


def test_a_lower_class_is_no_guest_of_a_higher_one() -> None:
    """Interactive calls leave no slots free for guests with batch calls. Batch calls leave slots free for guests with
    interactive calls."""
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
