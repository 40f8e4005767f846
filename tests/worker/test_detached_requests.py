"""Properties of detached requests, which outlive their gateway."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import FinishReason, TokenOutput
from cluster.worker.detached_requests import DETACHED_S, FAILED, DetachedRequest, DetachedRequests


def make_request(
    stream: str, request_id: str, prompt: int, ids: list[int], last: TokenOutput | None = None
) -> DetachedRequest:
    """Return a detached request. Its `parameters` field is the placeholder "it"."""
    return DetachedRequest(stream, request_id, "it", prompt, ids, last=last)


IDS = st.lists(st.integers(0, 3), max_size=6)


@given(IDS.filter(bool), st.lists(IDS, max_size=4), IDS, st.integers(0, 2), st.booleans())
def test_a_claim_gets_all_that_follows_what_it_shows(
    before: list[int], steps: list[list[int]], shown: list[int], prompt: int, ends: bool
) -> None:
    """`claim` returns a request whose gateway is gone, with all tokens of the request in order. It returns a request
    only once, and only for the right parameters, prompt length and first output tokens."""
    detached = DetachedRequests()
    detached.add(make_request("s", "r", 1, list(before)), 0.0)
    for number, ids in enumerate(steps):
        finish = FinishReason.LENGTH if ends and number == len(steps) - 1 else None
        detached.output(TokenOutput("r", ids, finish))
        detached.output(TokenOutput("another", ids))
    made = [*before, *(token for ids in steps for token in ids)]
    assert len(detached) == (0 if ends and steps else 1)
    assert detached.claim("another", "it", 1, shown) is None
    assert detached.claim("s", "else", 1, shown) is None
    claimed = detached.claim("s", "it", prompt, shown)
    if prompt != 1 or made[: len(shown)] != shown:
        assert claimed is None
        assert detached.claim("s", "it", 1, before) is not None, "it is kept for the right claim"
        return
    assert claimed is not None
    assert claimed.token_ids == made
    assert (claimed.last is not None) == bool(ends and steps)
    assert detached.claim("s", "it", prompt, shown) is None
    assert len(detached) == detached.tokens == 0
    assert detached.expired(DETACHED_S) == []


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=6).map(sorted), st.floats(0, 6))
def test_each_is_kept_for_a_moment(left: list[tuple[float, bool]], now: float) -> None:
    """A detached request is dropped after DETACHED_S. Its engine request id is returned if the request still runs."""
    detached = DetachedRequests()
    for number, (at, ended) in enumerate(left):
        assert detached.add(make_request(f"s{number}", f"r{number}", 5, [1]), at) == []
        if ended:
            detached.output(TokenOutput(f"r{number}", [2], FinishReason.STOP))
    late = {number for number, (at, _) in enumerate(left) if at + DETACHED_S <= now}
    assert set(detached.expired(now)) == {f"r{number}" for number in late if not left[number][1]}
    for number in range(len(left)):
        assert (detached.claim(f"s{number}", "it", 5, [1]) is None) == (number in late)


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(-2, 8), st.integers(-5, 60))
def test_room_is_made_by_the_oldest(prompts: list[int], sequences: int, tokens: int) -> None:
    """If capacity is needed, the oldest requests are dropped first, and only as many as needed."""
    detached = DetachedRequests()
    for number, prompt in enumerate(prompts):
        detached.add(make_request(f"s{number}", f"r{number}", prompt, [1]), float(number))
    detached.add(make_request("ended", "ended", 5, [1], last=TokenOutput("ended", [1], FinishReason.STOP)), 9.0)
    gone = detached.make_room(sequences, tokens)
    assert gone == [f"r{number}" for number in range(len(gone))]
    freed = [prompt + 1 for prompt in prompts[: len(gone)]]
    assert len(gone) == len(prompts) or (len(gone) >= sequences and sum(freed) >= tokens)
    if gone:
        assert len(gone) - 1 < sequences or sum(freed[:-1]) < tokens
    assert len(detached) == len(prompts) - len(gone)
    assert detached.claim("ended", "it", 5, [1]) is not None


def test_a_name_that_comes_again_is_the_newer_ones() -> None:
    """A second request with the same stream name replaces the first. `add` then returns the engine request id of the
    first, which the caller must abort."""
    detached = DetachedRequests()
    detached.add(make_request("s", "old", 5, [1]), 0.0)
    assert detached.add(make_request("s", "new", 5, [1, 2]), 1.0) == ["old"]
    claimed = detached.claim("s", "it", 5, [1])
    assert claimed is not None
    assert claimed.request_id == "new"


@pytest.mark.parametrize("finish", FAILED)
def test_what_the_engine_could_not_go_on_with_is_nobodys(finish: FinishReason) -> None:
    """A request that ended in an error or an abort cannot be claimed, so its sequence is computed again."""
    detached = DetachedRequests()
    detached.add(make_request("s", "r", 5, [1]), 0.0)
    assert detached.output(TokenOutput("r", [], finish)) == 0
    assert len(detached) == 0
    assert detached.claim("s", "it", 5, [1]) is None
    assert detached.expired(DETACHED_S) == []
