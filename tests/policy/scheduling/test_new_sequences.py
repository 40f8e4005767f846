"""Tests of the queues of new sequences: the waiting room, and the sequences that wait for their adapters."""

from __future__ import annotations

from cluster.policy.fairness.fair_queue import FairOrders
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.routing.router import RouteCall
from cluster.policy.routing.version_split import Versions
from cluster.policy.scheduling.new_sequences import NewSequences
from cluster.policy.scheduling.worker_waits import Need
from tests.policy.scheduling.policy_cases import MAX_WAIT_S, entry

ONE_VERSION = Versions("v1", frozenset({"v1"}))


def queues() -> NewSequences:
    """Return queues with a large waiting room."""
    room = WaitingRoom(max_requests=100, max_tokens=10_000, max_wait_s=MAX_WAIT_S, order_of=FairOrders().order)
    return NewSequences(room)


def wait_for_adapter(new: NewSequences, key: str, now: float) -> None:
    """Remove the first sequence, which must be `key`, from the waiting room, and let it wait for its adapter."""
    taken = new.room.pop_next("m", lambda _: True, now)
    assert taken is not None
    assert taken.call_id == key
    new.worker_waits.add(taken, RouteCall("m", taken.tokens), Need("x"), now, now + MAX_WAIT_S)


def test_a_sequence_counts_until_it_is_removed() -> None:
    """A sequence that waits for its adapter is counted as waiting, at position 0. The first `remove` returns True and
    the second returns False."""
    new = queues()
    for key in ("a", "b"):
        assert new.admit(entry(key, adapter="x"), 0.0, versions=ONE_VERSION).outcome is None
    wait_for_adapter(new, "a", 1.0)
    assert (new.position("a"), new.position("b"), new.waiting("m")[0]) == (0, 0, 2)
    assert (new.remove("a"), new.remove("a")) == (True, False)
    assert (new.position("a"), new.waiting("m")[0], dict(new.versions)) == (None, 1, {"b": ONE_VERSION})


def test_new_versions_return_a_sequence_to_the_room() -> None:
    """If the model versions on which a sequence may begin change while it waits for its adapter, the sequence returns
    to the waiting room."""
    new = queues()
    new.admit(entry("a", adapter="x"), 0.0)
    wait_for_adapter(new, "a", 1.0)
    new.set_versions("a", ONE_VERSION)
    assert "a" not in new.worker_waits
    assert (new.room.waiting("m")[0], new.versions["a"]) == (1, ONE_VERSION)
    new.set_versions("a", Versions())
    assert not new.versions


def test_expired_sequences_leave_every_queue() -> None:
    """Sequences can expire in the waiting room and while they wait for adapters."""
    new = queues()
    for key in ("a", "b"):
        new.admit(entry(key, adapter="x"), 0.0, versions=ONE_VERSION)
    wait_for_adapter(new, "a", 0.0)
    assert new.pop_expired(MAX_WAIT_S / 2) == []
    assert sorted(new.pop_expired(MAX_WAIT_S + 1)) == ["a", "b"]
    assert (new.waiting("m"), dict(new.versions)) == ((0, 0), {})
