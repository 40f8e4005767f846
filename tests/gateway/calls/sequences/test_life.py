"""The life of a sequence: its state transitions, and the history of its workers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.calls.sequences.life import ENDED, MOVES, WAITING, Event, IllegalSequenceMove, Life, State

PAIRS = list(itertools.product(State, Event))
NOW = 100.0


@pytest.mark.parametrize(("state", "event"), PAIRS, ids=lambda one: one.value)
def test_every_pair_moves_or_is_illegal(state: State, event: Event) -> None:
    """`apply` follows the table of transitions. A pair that is not in the table leaves the state unchanged and raises
    an error with the state and the event."""
    life = Life(state=state)
    if (state, event) in MOVES:
        assert life.apply(event) is MOVES[state, event] is life.state
        return
    with pytest.raises(IllegalSequenceMove, match=f"{state.value} cannot be {event.value}"):
        life.apply(event)
    assert life.state is state


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_an_ended_sequence_stays_ended(events: list[Event]) -> None:
    """No event changes the state of a sequence that has ended."""
    for end in ENDED:
        life = Life(state=end)
        for event in events:
            assert life.apply(event) is end


@given(st.data())
def test_every_live_state_reaches_both_ends(data: st.DataObject) -> None:
    """A sequence can finish and fail from every state that is not final."""
    life = Life()
    for _ in range(data.draw(st.integers(0, 20))):
        life.apply(data.draw(st.sampled_from([event for state, event in MOVES if state is life.state])))
        if life.state in ENDED:
            return
    for event, end in ((Event.FINISHED, State.DONE), (Event.FAILED, State.FAILED)):
        assert Life(state=life.state).apply(event) is end


def state_of(life: Life) -> State:
    """Return the state of `life`. Because of this function, the type checker does not assume that later moves leave the
    state unchanged."""
    return life.state


def running(tokens: int = 0, max_attempts: int = 3, max_silent_losses: int = 2) -> Life:
    """Return the life of a sequence at its first worker, with or without emitted tokens."""
    life = Life(max_attempts, max_silent_losses)
    life.submitted("w1", None)
    if tokens:
        life.answered()
    return life


@given(st.integers(0, 50), st.sampled_from(["lost", "error", "moved"]))
def test_a_sequence_with_tokens_resumes_and_one_without_starts_over(tokens: int, reason: str) -> None:
    """A sequence that leaves its worker after emitting tokens waits in the resume queue and keeps the reason. A
    sequence without tokens waits in the waiting room, without a reason. Both have the next attempt number."""
    life = running(tokens)
    life.leave(reason, tokens)
    assert life.state is (State.RESUMING if tokens else State.QUEUED)
    assert life.state in WAITING
    assert (life.attempt, life.reason) == (2, reason if tokens else "")
    life.submitted("w2", None)
    assert life.answered() == (reason if tokens else "")
    assert (life.state, life.reason, life.last_worker) == (State.RUNNING, "", "w2")


@given(st.integers(1, 6))
def test_as_many_workers_may_fail_it_as_are_allowed(most: int) -> None:
    """A sequence fails when `max_attempts` workers have failed it, and not before."""
    life = running(tokens=1, max_attempts=most)
    for failure in range(1, most + 1):
        waits = life.fail_worker("lost", 1)
        assert waits is (failure < most)
        if waits:
            life.submitted(f"w{failure}", None)
            life.answered()


@given(st.integers(1, 4), st.integers(0, 3))
def test_it_is_suspect_after_losses_with_no_token_between(most: int, tokens: int) -> None:
    """A sequence is suspected of harming workers after it lost several workers without a new token between the losses.
    A new token, or a call of `acquit`, restarts the count."""
    life = running(tokens=1, max_silent_losses=most)
    for number in range(most):
        assert not life.suspect(tokens)
        life.lost(f"link{number}", "node", tokens, NOW + number)
    assert life.suspect(tokens)
    assert life.silent_since(tokens) == NOW
    assert not life.suspect(tokens + 1)
    assert life.silent_since(tokens + 1) is None
    life.lost("another", "node", tokens + 1, NOW + most)
    assert life.loss.links == ("another",)
    life.acquit()
    assert not life.suspect(tokens + 1)


def test_a_suspect_without_tokens_waits_in_the_resume_queue() -> None:
    """A suspect sequence (one that may have ended its worker) waits in the resume queue, even if it has no tokens yet.
    The waiting room would send it to a worker at once."""
    life = running(max_silent_losses=1)
    life.lost("link", "node", 0, NOW)
    assert life.fail_worker("lost", 0)
    assert state_of(life) is State.RESUMING
    life.acquit()
    life.submitted("w2", None)
    life.wait(0)
    assert state_of(life) is State.QUEUED


def test_only_a_lost_gateway_leaves_kv_blocks_to_return_to() -> None:
    """If a sequence's gateway was lost, the sequence resumes on the worker that holds its KV blocks (`cached_on`). If a
    sequence left its worker for another reason, `cached_on` is empty."""
    life = Life()
    life.restore("w1", None, tokens=3)
    assert (life.state, life.cached_on) == (State.RESUMING, "w1")
    life.submitted("w1", None)
    life.answered()
    life.leave("moved", 4)
    assert life.cached_on == ""
