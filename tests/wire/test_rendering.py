"""A worker sends a rendered prompt in pieces. The gateway joins the pieces to the same prompt."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.rendering import PIECE_BYTES, JoinedPieces, RenderedPieces

SIZES = st.sampled_from([0, 1, 7, PIECE_BYTES // 4 - 1, PIECE_BYTES // 4, PIECE_BYTES // 4 + 1, 3 * PIECE_BYTES // 4])


@given(st.lists(SIZES, max_size=6))
def test_joined_pieces_are_the_prompts(sizes: list[int]) -> None:
    """Prompts of any size arrive whole and in order, in messages of at most PIECE_BYTES bytes of ids."""
    prompts = [array("I", range(size)).tobytes() for size in sizes]
    pieces = RenderedPieces()
    for number, ids in enumerate(prompts):
        pieces.add(pb.Rendered(number=number, token_ids=ids, tokens=len(ids) // 4))
    joined = [JoinedPieces(1 << 20) for _ in prompts]
    ended = []
    while pieces:
        message = pieces.next_message()
        assert message
        assert sum(len(piece.token_ids) for piece in message) <= PIECE_BYTES
        for piece in message:
            assert piece.more or piece.tokens == sizes[piece.number]
            joined[piece.number].add(piece)
            ended += [] if piece.more else [piece.number]
    assert [one.ids for one in joined] == prompts
    assert ended == list(range(len(prompts)))


@pytest.mark.parametrize("ids", [b"\0" * 12, b"\0" * 5])
def test_ids_that_were_not_requested_are_refused(ids: bytes) -> None:
    """More ids than requested, or a piece that ends within an id, raise ValueError."""
    with pytest.raises(ValueError, match="bytes of ids"):
        JoinedPieces(2).add(pb.Rendered(token_ids=ids))


def test_errors_are_cut() -> None:
    """A long error text of a rendering is cut."""
    pieces = RenderedPieces()
    pieces.add(pb.Rendered(number=1, reason="INTERNAL", message="x" * 1_000_000))
    (piece,) = pieces.next_message()
    assert 0 < len(piece.message) < 10_000
