"""Laws of requests that outlive their gateway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import FinishReason, TokenOutput
from cluster.worker.detached_requests import FAILED, KEEP_S, DetachedRequest, DetachedRequests


def orphan(
    stream: str, request_id: str, prompt: int, ids: list[int], last: TokenOutput | None = None
) -> DetachedRequest:
    """One that asked for `it`."""
    return DetachedRequest(stream, request_id, "it", prompt, ids, last=last)


IDS = st.lists(st.integers(0, 3), max_size=6)


@given(IDS.filter(bool), st.lists(IDS, max_size=4), IDS, st.integers(0, 2), st.booleans())
def test_a_claim_gets_all_that_follows_what_it_shows(
    before: list[int], steps: list[list[int]], shown: list[int], prompt: int, ends: bool
) -> None:
    """Exactly those whose first tokens are the ones shown, behind a prompt as long; then all tokens of it, in order,
    once."""
    orphans = DetachedRequests()
    orphans.add(orphan("s", "r", 1, list(before)), 0.0)
    for number, ids in enumerate(steps):
        finish = FinishReason.LENGTH if ends and number == len(steps) - 1 else None
        orphans.output(TokenOutput("r", ids, finish))
        orphans.output(TokenOutput("another", ids))
    made = [*before, *(one for ids in steps for one in ids)]
    assert len(orphans) == (0 if ends and steps else 1)
    assert orphans.claim("another", "it", 1, shown) is None
    assert orphans.claim("s", "else", 1, shown) is None
    found = orphans.claim("s", "it", prompt, shown)
    if prompt != 1 or made[: len(shown)] != shown:
        assert found is None
        assert orphans.claim("s", "it", 1, before) is not None, "it is there for whoever it belongs to"
        return
    assert found is not None
    assert found.token_ids == made
    assert (found.last is not None) == bool(ends and steps)
    assert orphans.claim("s", "it", prompt, shown) is None
    assert len(orphans) == orphans.tokens == 0
    assert orphans.expired(KEEP_S) == []


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=6).map(sorted), st.floats(0, 6))
def test_each_is_kept_for_a_moment(left: list[tuple[float, bool]], now: float) -> None:
    """Dropped once its time is over, and told to the engine if it still runs there."""
    orphans = DetachedRequests()
    for number, (at, ended) in enumerate(left):
        assert orphans.add(orphan(f"s{number}", f"r{number}", 5, [1]), at) == []
        if ended:
            orphans.output(TokenOutput(f"r{number}", [2], FinishReason.STOP))
    late = {number for number, (at, _) in enumerate(left) if at + KEEP_S <= now}
    assert set(orphans.expired(now)) == {f"r{number}" for number in late if not left[number][1]}
    for number in range(len(left)):
        assert (orphans.claim(f"s{number}", "it", 5, [1]) is None) == (number in late)


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(-2, 8), st.integers(-5, 60))
def test_room_is_made_by_the_oldest(prompts: list[int], sequences: int, tokens: int) -> None:
    """No more of them go than are needed, and all of them if need be."""
    orphans = DetachedRequests()
    for number, prompt in enumerate(prompts):
        orphans.add(orphan(f"s{number}", f"r{number}", prompt, [1]), float(number))
    orphans.add(orphan("ended", "ended", 5, [1], last=TokenOutput("ended", [1], FinishReason.STOP)), 9.0)
    gone = orphans.make_room(sequences, tokens)
    assert gone == [f"r{number}" for number in range(len(gone))]
    freed = [prompt + 1 for prompt in prompts[: len(gone)]]
    assert len(gone) == len(prompts) or (len(gone) >= sequences and sum(freed) >= tokens)
    if gone:
        assert len(gone) - 1 < sequences or sum(freed[:-1]) < tokens
    assert len(orphans) == len(prompts) - len(gone)
    assert orphans.claim("ended", "it", 5, [1]) is not None


def test_a_name_that_comes_again_is_the_newer_ones() -> None:
    """The older is told to the engine: nobody can ask for it any longer."""
    orphans = DetachedRequests()
    orphans.add(orphan("s", "old", 5, [1]), 0.0)
    assert orphans.add(orphan("s", "new", 5, [1, 2]), 1.0) == ["old"]
    found = orphans.claim("s", "it", 5, [1])
    assert found is not None
    assert found.request_id == "new"


@pytest.mark.parametrize("finish", FAILED)
def test_what_the_engine_could_not_go_on_with_is_nobodys(finish: FinishReason) -> None:
    """Whoever comes for it has it computed anew."""
    orphans = DetachedRequests()
    orphans.add(orphan("s", "r", 5, [1]), 0.0)
    assert orphans.output(TokenOutput("r", [], finish)) == 0
    assert len(orphans) == 0
    assert orphans.claim("s", "it", 5, [1]) is None
    assert orphans.expired(KEEP_S) == []
