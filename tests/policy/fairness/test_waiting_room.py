"""Tests of the waiting room: bounds, order, deadlines and counts."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from cluster.api.outcomes import Outcome
from cluster.policy.fairness.fair_queue import FairOrder
from cluster.policy.fairness.waiting_room import WaitingRoom, WaitingSequence
from loadtests.sim.fifo import FifoOrder
from tests.support.cpu import cpu_within

pytestmark = pytest.mark.slow


def waiting(
    call_id: str, *, model: str = "m", tokens: int = 10, deadline: float | None = None, arrived: float = 0.0
) -> WaitingSequence:
    """Return a waiting sequence."""
    return WaitingSequence(call_id, model, "tenant", tokens, deadline, "standard", arrived)


def room(max_requests: int = 1000, max_tokens: int = 100_000, max_wait_s: float = 60.0) -> WaitingRoom:
    """Return a waiting room with large bounds, or with the given bounds."""
    return WaitingRoom(
        max_requests=max_requests, max_tokens=max_tokens, max_wait_s=max_wait_s, order_of=lambda model: FifoOrder()
    )


def fits(_: WaitingSequence) -> bool:
    """Return True: every sequence fits."""
    return True


def test_first_come_first_served_by_model() -> None:
    """Each model has its own queue, in the order of arrival."""
    r = room()
    for call_id, model in (("a", "x"), ("b", "y"), ("c", "x")):
        assert r.admit(waiting(call_id, model=model), 0.0).outcome is None
    taken = [r.pop_next(model, fits) for model in ("x", "x", "x", "y", "none")]
    assert [w.call_id if w else None for w in taken] == ["a", "c", None, "b", None]


def test_only_the_head_is_offered() -> None:
    """If the first waiting sequence does not fit on a worker, a shorter sequence behind it does not overtake it."""
    r = room()
    r.admit(waiting("long", tokens=900), 0.0)
    r.admit(waiting("short", tokens=1), 0.0)
    offered: list[str] = []

    def small(w: WaitingSequence) -> bool:
        offered.append(w.call_id)
        return w.tokens < 100

    assert r.pop_next("m", small) is None
    assert offered == ["long"]
    assert r.waiting("m") == (2, 901)


def test_full_by_requests_and_by_tokens() -> None:
    """A sequence that exceeds either bound is refused and changes nothing. A sequence that exactly reaches the bound is
    admitted."""
    r = room(max_requests=2, max_tokens=100)
    assert r.admit(waiting("a", tokens=60), 0.0).outcome is None
    assert r.admit(waiting("b", tokens=41), 0.0).outcome is Outcome.QUEUE_FULL
    assert r.admit(waiting("c", tokens=40, model="other"), 0.0).outcome is None
    assert r.admit(waiting("d", tokens=0), 0.0).outcome is Outcome.QUEUE_FULL
    assert r.position("b") is None
    assert r.waiting("m") == (1, 60)
    s = r.statistics()
    assert (s.requests, s.tokens, s.entered, s.refused) == (2, 100, 2, 2)


def test_put_back_goes_to_the_head_in_order_of_arrival() -> None:
    """Sequences that lost their worker are put before all other sequences, in the order of arrival. A full room accepts
    them, too."""
    r = room(max_requests=3)
    for number, call_id in enumerate("abc"):
        r.admit(waiting(call_id, arrived=float(number)), 0.0)
    lost = [w for w in (r.pop_next("m", fits), r.pop_next("m", fits)) if w is not None]
    r.admit(waiting("d", arrived=5.0), 5.0)
    r.admit(waiting("e", arrived=6.0), 6.0)
    for w in reversed(lost):
        r.put_back(w, 7.0)
    assert [r.position(call_id) for call_id in "abcde"] == [0, 1, 2, 3, 4]
    taken = [r.pop_next("m", fits) for _ in range(5)]
    assert [w.call_id for w in taken if w is not None] == list("abcde")


def test_what_was_put_back_is_not_shed() -> None:
    """A full room sheds the last sequence of the longest queue, but none that had its turn before."""
    r = room(max_requests=4)
    for call_id in "abcd":
        r.admit(waiting(call_id), 0.0)
    lost = r.pop_next("m", fits)
    assert lost is not None
    r.put_back(lost, 1.0)
    shed = r.admit(dataclasses.replace(waiting("new"), tenant="another"), 2.0).shed
    assert [w.call_id for w in shed] == ["d"]
    assert r.cancel("a")
    for call_id in "bc":
        r.cancel(call_id)
    assert r.statistics().requests == 1


def test_expiry_by_deadline_and_by_wait() -> None:
    """A sequence past its deadline or its maximum wait is returned once. The sequence that expired first is returned
    first."""
    r = room(max_wait_s=10.0)
    r.admit(waiting("patient"), 1.0)
    r.admit(waiting("late", deadline=5.0), 1.0)
    r.admit(waiting("far", deadline=500.0), 4.0)
    assert r.pop_expired(4.9) == []
    assert [w.call_id for w in r.pop_expired(11.0)] == ["late", "patient"]
    assert [w.call_id for w in r.pop_expired(14.0)] == ["far"]
    assert r.pop_expired(100.0) == []
    assert r.statistics().expired == 3


def test_a_second_stay_has_its_own_time() -> None:
    """A sequence that enters the waiting room a second time gets a new expiry time. The earlier expiry time no longer
    applies."""
    r = room(max_wait_s=10.0)
    r.admit(waiting("a"), 0.0)
    w = r.pop_next("m", fits)
    assert w is not None
    r.put_back(w, 9.0)
    assert r.pop_expired(18.9) == []
    assert [x.call_id for x in r.pop_expired(19.0)] == ["a"]


def test_entering_twice_is_an_error() -> None:
    """Adding a call id that already waits raises ValueError and changes nothing."""
    r = room()
    r.admit(waiting("a"), 0.0)
    with pytest.raises(ValueError, match="already waits"):
        r.admit(waiting("a"), 0.0)
    with pytest.raises(ValueError, match="already waits"):
        r.put_back(waiting("a"), 0.0)
    assert r.waiting("m") == (1, 10)


def test_leave_of_a_stranger_is_false() -> None:
    """Removing a sequence that does not wait returns False."""
    r = room()
    assert not r.cancel("nobody")
    r.admit(waiting("a"), 0.0)
    assert r.cancel("a")
    assert not r.cancel("a")


def test_a_hundred_thousand_cost_microseconds_each() -> None:
    """With 100,000 sequences in the fair order of production, each sequence is added, located, cancelled and bound in
    some µs.

    The bound is loose: 40 µs for the four operations together.
    """
    r = WaitingRoom(max_requests=100_000, max_tokens=10**9, max_wait_s=60.0, order_of=lambda model: FairOrder())
    ids = [str(i) for i in range(100_000)]
    with cpu_within(100_000 * 40e-6):
        for call_id in ids:
            r.admit(waiting(call_id), 0.0)
        for call_id in ids:
            r.position(call_id)
        for call_id in ids[1::2]:
            r.cancel(call_id)
        while r.pop_next("m", fits) is not None:
            pass
    assert r.statistics().models == {}


class RoomMachine(RuleBasedStateMachine):
    """State machine of a waiting room, compared with a plain list that is searched linearly."""

    bound = Bundle("bound")

    def __init__(self) -> None:
        super().__init__()
        self.room = WaitingRoom(max_requests=90, max_tokens=600, max_wait_s=10.0, order_of=lambda model: FifoOrder())
        self.lines: dict[str, list[WaitingSequence]] = {"x": [], "y": []}
        self.returned: set[str] = set()
        self.expires: dict[str, float] = {}
        self.now = 0.0
        self.serial = 0

    def _all(self) -> list[WaitingSequence]:
        return [w for line in self.lines.values() for w in line]

    def _drop(self, w: WaitingSequence) -> None:
        self.lines[w.model].remove(w)
        self.returned.discard(w.call_id)

    @rule(
        model=st.sampled_from("xy"),
        count=st.sampled_from([1, 3, 70]),
        tokens=st.integers(0, 9),
        patience=st.none() | st.integers(0, 20),
    )
    def enter(self, model: str, count: int, tokens: int, patience: int | None) -> None:
        """Admit `count` sequences to the room. `patience`: seconds until the deadline of a sequence; None for no
        deadline."""
        for _ in range(count):
            deadline = None if patience is None else self.now + patience
            w = waiting(str(self.serial), model=model, tokens=tokens, deadline=deadline, arrived=self.now)
            self.serial += 1
            there = self._all()
            full = len(there) >= 90 or sum(x.tokens for x in there) + tokens > 600
            refused = Outcome.DEADLINE_UNREACHABLE if patience == 0 else Outcome.QUEUE_FULL if full else None
            admission = self.room.admit(w, self.now)
            assert admission.outcome is refused
            assert not admission.shed, "no sequence is shed for another of the same tenant and class"
            if refused is None:
                self.lines[model].append(w)
                self.expires[w.call_id] = min(self.now + 10.0, self.now + 10.0 if deadline is None else deadline)

    @rule(target=bound, model=st.sampled_from("xy"), limit=st.integers(0, 9))
    def next(self, model: str, limit: int) -> WaitingSequence | None:
        """Return the first sequence of the fair order if its tokens are within `limit`, and take it out of the room."""
        line = self.lines[model]
        expected = line[0] if line and line[0].tokens <= limit else None
        got = self.room.pop_next(model, lambda w: w.tokens <= limit)
        assert got == expected
        if got is not None:
            self._drop(got)
        return got

    @rule(w=consumes(bound))
    def put_back(self, w: WaitingSequence | None) -> None:
        """Put back a bound sequence, as after the loss of its worker."""
        if w is None:
            return
        self.room.put_back(w, self.now)
        line = self.lines[w.model]
        at = sum(1 for x in line if x.call_id in self.returned and x.arrived <= w.arrived)
        line.insert(at, w)
        self.returned.add(w.call_id)
        self.expires[w.call_id] = min(self.now + 10.0, self.now + 10.0 if w.deadline is None else w.deadline)

    @rule(data=st.data(), share=st.sampled_from([1, 30]))
    def leave(self, data: st.DataObject, share: int) -> None:
        """Cancel sequences at any position."""
        for _ in range(share):
            there = self._all()
            if there:
                w = there[data.draw(st.integers(0, len(there) - 1))]
                assert self.room.cancel(w.call_id)
                self._drop(w)

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        """Advance the time, so that some sequences expire."""
        self.now += seconds
        gone = self.room.pop_expired(self.now)
        overdue = [w for w in self._all() if self.expires[w.call_id] <= self.now]
        assert sorted(w.call_id for w in gone) == sorted(w.call_id for w in overdue)
        assert [self.expires[w.call_id] for w in gone] == sorted(self.expires[w.call_id] for w in gone)
        for w in gone:
            self._drop(w)

    @invariant()
    def counts_and_positions_equal_a_recount(self) -> None:
        """No sequence is lost or duplicated, and all positions are right."""
        s = self.room.statistics()
        there = self._all()
        assert (s.requests, s.tokens) == (len(there), sum(w.tokens for w in there))
        assert s.entered + s.put_back == s.requests + s.bound + s.cancelled + s.expired
        assert set(s.models) == {model for model, line in self.lines.items() if line}
        for model, line in self.lines.items():
            assert self.room.waiting(model) == (len(line), sum(w.tokens for w in line))
            assert [self.room.position(w.call_id) for w in line] == list(range(len(line)))


RoomMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRoom = RoomMachine.TestCase
