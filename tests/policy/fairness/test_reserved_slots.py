"""Places are kept for guests, few of them, and from those alone who always wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.fairness.fair_queue import IDLE_S, FairOrder
from cluster.policy.fairness.order import Waiting
from cluster.policy.fairness.reserved_slots import GUEST_S, KEPT_MOST, KEPT_OF, ReservedSlots

RUNNING = KEPT_OF * 2


def call(call_id: str, tenant: str, rank: int = 0) -> Waiting:
    """One that waits."""
    return Waiting(call_id, "m", tenant, 100, None, "standard", 0.0, rank)


def flooded(guest_rank: int = 0, loud_rank: int = 0) -> tuple[FairOrder, Waiting]:
    """A loud tenant has RUNNING calls that run and one that waits since time 0; a guest has come and gone at 5 s, and
    the loud one has had another turn."""
    order = FairOrder()
    head = call("head", "loud", loud_rank)
    order.push(head, 0.0)
    for number in range(RUNNING):
        order.push(call(f"loud-{number}", "loud", loud_rank), 0.0)
        order.taken(f"loud-{number}", 0.0)
    order.push(call("guest", "guest", guest_rank), 5.0)
    order.taken("guest", 5.0)
    order.push(call("one-more", "loud", loud_rank), 5.0)
    order.taken("one-more", 5.0)
    order.sweep(5.1)
    return order, head


def test_places_are_kept_from_who_always_waits() -> None:
    """Beside a guest the loud tenant leaves its part free, until no guest has come for GUEST_S."""
    order, head = flooded()
    assert order.keep_free(head) == RUNNING // KEPT_OF
    order.sweep(5.0 + IDLE_S + GUEST_S + 1)
    assert order.keep_free(head) == 0


def test_nothing_is_kept_from_guests() -> None:
    """One who has just come takes its turn whatever is free, and so does one whose worker was lost."""
    order, _ = flooded()
    again = call("again", "guest")
    order.push(again, 6.0)
    assert order.keep_free(again) == 0
    lost = call("loud-0", "loud")
    order.put_back(lost)
    assert order.keep_free(lost) == 0


def test_a_lower_class_is_no_guest_of_a_higher_one() -> None:
    """Interactive calls leave nothing free for batch ones; batch ones do for interactive ones."""
    order, head = flooded(guest_rank=2, loud_rank=0)
    assert order.keep_free(head) == 0
    order, head = flooded(guest_rank=0, loud_rank=2)
    assert order.keep_free(head) > 0


def test_two_who_flood_are_nobodys_guests() -> None:
    """Where everybody always waits no place is kept: fairness alone decides, and all room is used."""
    order = FairOrder()
    for tenant in ("one", "other"):
        for number in range(RUNNING):
            order.push(call(f"{tenant}-{number}", tenant), 0.0)
    for number in range(RUNNING):
        head_now = order.head()
        assert head_now is not None
        order.taken(head_now.call_id, 0.1 * number)
        order.sweep(0.1 * number)
    last = order.head()
    assert last is not None
    assert order.keep_free(last) == 0


@given(
    st.integers(0, 100_000), st.lists(st.tuples(st.integers(0, 5), st.floats(0, 100)), max_size=5), st.floats(0, 200)
)
def test_never_more_than_its_part(filled: int, seen: list[tuple[int, float]], now: float) -> None:
    """Whoever is about: at most one in KEPT_OF of what runs, and at most KEPT_MOST."""
    guests = ReservedSlots()
    for rank, at in seen:
        guests.note_guest(rank, at)
    kept = guests.reserved(3, filled, now)
    assert 0 <= kept <= min(filled / KEPT_OF, KEPT_MOST)
    about = any(rank <= 3 and now < at + GUEST_S for rank, at in seen)
    assert kept == 0 or about
