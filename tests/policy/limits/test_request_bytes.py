"""Tests of the budget for the bytes of request bodies: bounds, order, no deadlock, and stalled bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.limits.request_bytes import GRACE_S, MIN_BYTES_PER_S, ByteBounds, RequestBytes, Reservation

BOUNDS = ByteBounds(connection=100, tenant=150, process=300)


@dataclass
class Bodies:
    """Reservations of one budget, one for each body. `granted`: names of the bodies in the order of the grants."""

    now: float = 0.0
    granted: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    budget: RequestBytes = field(init=False)

    def __post_init__(self) -> None:
        self.budget = RequestBytes(BOUNDS, lambda: self.now)

    def reserve(self, name: str, tenant: str, connection: str, size: int) -> Reservation:
        """Reserve the bytes of one body."""

        def append_to(names: list[str]) -> Callable[[], None]:
            return lambda: names.append(name)

        reservation = self.budget.reserve(tenant, connection, size, append_to(self.granted), append_to(self.slow))
        if reservation.granted:
            self.granted.append(name)
        return reservation


def test_each_bound_holds_and_is_given_back() -> None:
    """A body that would exceed a bound waits until enough bytes are released. There are bounds for a connection, a
    tenant and the process."""
    bodies = Bodies()
    first = bodies.reserve("a1", "a", "c1", 80)
    bodies.reserve("a1 more", "a", "c1", 21)
    bodies.reserve("a2", "a", "c2", 70)
    bodies.reserve("a3", "a", "c3", 1)
    bodies.reserve("b1", "b", "d1", 100)
    bodies.reserve("c1", "c", "e1", 51)
    assert bodies.granted == ["a1", "a2", "b1"]
    first.release()
    assert bodies.granted == ["a1", "a2", "b1", "c1", "a1 more", "a3"]
    assert (bodies.budget.held, bodies.budget.held_by("a"), bodies.budget.waiting) == (243, 92, 0)
    first.release()
    assert bodies.budget.held == 243, "releasing twice gives back once"


def test_a_body_larger_than_a_bound_is_granted_alone() -> None:
    """A request body that is larger than a bound of the budget is granted as soon as all other granted bodies are
    released."""
    bodies = Bodies()
    small = bodies.reserve("small", "a", "c1", 10)
    bodies.reserve("large", "a", "c2", 1000)
    assert bodies.granted == ["small"]
    small.release()
    assert bodies.granted == ["small", "large"]


def test_a_large_body_is_not_overtaken_for_ever() -> None:
    """Free bytes are kept for the first waiting body, so a large body is not overtaken for ever.

    Smaller bodies of tenants that hold more bytes do not get the kept bytes.
    """
    bodies = Bodies()
    held = [bodies.reserve(f"a{i}", "a", f"c{i}", 50) for i in range(3)]
    held += [bodies.reserve(f"b{i}", "b", f"d{i}", 50) for i in range(3)]
    bodies.reserve("large", "c", "e", 100)
    held[0].release()
    bodies.reserve("small", "a", "c9", 10)
    assert "small" not in bodies.granted
    held[3].release()
    assert bodies.granted[-1] == "large"


def test_tenants_and_connections_that_hold_less_go_first() -> None:
    """A tenant with many waiting bodies does not delay other tenants."""
    bodies = Bodies()
    held = [bodies.reserve(f"a{i}", "a", f"c{i}", 75) for i in range(2)]
    held += [bodies.reserve(f"b{i}", "b", f"d{i}", 75) for i in range(2)]
    for i in range(5):
        bodies.reserve(f"a more {i}", "a", "c0", 75)
    bodies.reserve("c", "c", "e", 75)
    bodies.reserve("a new", "a", "c8", 75)
    held[0].release()
    assert bodies.granted[-1] == "c"
    held[1].release()
    assert bodies.granted[-1] == "a more 0"
    held[2].release()
    assert bodies.granted[-1] == "a new", "its other connection holds 75 already"


def test_stalled_bodies_are_named_once_others_wait() -> None:
    """`slow` lists a request body that has stalled for longer than the grace period, but only while another body
    waits for memory.

    Complete bodies are not listed, nor are bodies that arrive at the minimum rate or faster.
    """
    bodies = Bodies()
    bodies.budget = RequestBytes(ByteBounds(1 << 30, 3 << 30, 3 << 30), lambda: bodies.now)
    bodies.reserve("stalled", "a", "c1", 1 << 30)
    complete = bodies.reserve("complete", "a", "c2", 1 << 30)
    steady = bodies.reserve("steady", "a", "c3", 1 << 30)
    complete.complete()
    bodies.now = GRACE_S + 10
    assert not bodies.budget.slow(), "nobody waits for its bytes"
    steady.received(10 * MIN_BYTES_PER_S)
    waiting = bodies.reserve("waiting", "a", "c4", 1)
    for one in bodies.budget.slow():
        one.too_slow()
        one.release()
    assert bodies.slow == ["stalled"]
    assert waiting.granted


def test_shrinking_gives_the_rest_back() -> None:
    """The reservation of a body of unknown size can be shrunk. It then keeps only the bytes that have arrived, and
    returns the rest to the budget."""
    bodies = Bodies()
    unknown = bodies.reserve("unknown", "a", "c1", 100)
    bodies.reserve("next", "a", "c1", 60)
    bodies.budget.shrink(unknown, 40)
    assert bodies.granted == ["unknown", "next"]
    assert bodies.budget.held == 100


Asked = tuple[int, int, int, bool]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 120), st.booleans()), max_size=60),
    st.randoms(use_true_random=False),
)
def test_law_bounds_hold_and_every_body_is_granted_in_the_end(asked: list[Asked], chance: object) -> None:
    """No bound is exceeded and every body is granted, whatever the order of reservations and releases."""
    bodies = Bodies()
    live: list[Reservation] = []
    for number, (tenant, connection, size, release) in enumerate(asked):
        live.append(bodies.reserve(str(number), f"t{tenant}", (tenant, connection).__str__(), size))
        _bounds_hold(bodies.budget, live)
        if release:
            live.pop(chance.randrange(len(live))).release()  # type: ignore[attr-defined]
            _bounds_hold(bodies.budget, live)
    while live:
        holding = [one for one in live if one.granted]
        assert holding, "some wait although nothing is held"
        holding[0].release()
        live.remove(holding[0])
        _bounds_hold(bodies.budget, live)
    assert (bodies.budget.held, bodies.budget.waiting) == (0, 0)
    assert repr(bodies.budget) == "<RequestBytes 0 of 300 bytes, 0 reservations wait>"


def _bounds_hold(budget: RequestBytes, live: list[Reservation]) -> None:
    granted = [one for one in live if one.granted]
    assert budget.held == sum(one.size for one in granted) <= BOUNDS.process
    assert budget.waiting == len(live) - len(granted)
    for name in {one.tenant for one in granted}:
        assert budget.held_by(name) <= BOUNDS.tenant
    for connection in {one.connection for one in granted}:
        sizes = [one.size for one in granted if one.connection == connection]
        assert len(sizes) == 1 or sum(sizes) <= BOUNDS.connection
