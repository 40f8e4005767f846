"""The pieces of one sequence add up to the whole output, and only the last piece has the end of the output. This holds
whenever the API pops the pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, ParsedOutput, PartKind
from cluster.api.types import PositionLogprobs
from cluster.gateway.calls.sequences.pieces import Piece, PieceBuffer
from cluster.gateway.text.logprobs import TokenLogprob
from cluster.gateway.text.parsed_text import ParsedText
from tests.gateway.text.test_parsed_text import PlainText

ONE = TokenLogprob(1, "x", b"x", -0.5)


class NoTexts:
    """A LogprobSource that never has log probabilities."""

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Implements `LogprobSource.push`."""
        return []

    def restore(self, token_ids: Sequence[int]) -> None:
        """Implements `LogprobSource.restore`."""


@given(st.lists(st.sampled_from(["token", "pop", "pop_text"]), max_size=30))
def test_pieces_add_up_to_the_text(steps: list[str]) -> None:
    """Joined, the pieces that are popped from the buffer give the whole text. Only the first piece is marked as first,
    and only the last one has a finish reason."""
    source = PlainText()
    buffer = PieceBuffer(2, source, None, None)
    pieces: list[Piece] = []
    text = ""
    for step in steps:
        if step == "token":
            source.push([1])
        elif step == "pop" and (piece := buffer.pop()) is not None:
            pieces.append(piece)
            text += piece.text
        elif step == "pop_text" and (more := buffer.pop_text()) is not None:
            assert pieces, "the first piece is more than its text"
            text += more
        assert buffer.delivered == buffer.shown == len(text)
    buffer.finish("stop", "END")
    assert buffer.pop_text() is None
    last = buffer.pop()
    assert last is not None
    pieces.append(last)
    assert (text + last.text, buffer.end_popped) == ("x" * len(source.token_ids), True)
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["stop"]
    assert (last.index, last.stop_string) == (2, "END")
    assert buffer.pop() is None


def test_a_guard_may_refuse_text_that_was_held_back_to_the_end() -> None:
    """If a guard refuses text at the very end, the last piece has the guard's finish reason."""
    source = PlainText()
    buffer = PieceBuffer(0, source, None, None)
    buffer.finish("length", "")
    source.refused = True
    piece = buffer.pop()
    assert piece is not None
    assert piece.finish_reason == "content_filter"


def test_log_probabilities_need_a_piece() -> None:
    """If text has log probabilities, `pop_text` returns None, and `pop` returns a piece with both. Each log probability
    is returned once."""
    source = PlainText()
    buffer = PieceBuffer(0, source, NoTexts(), None)
    for _ in range(3):
        source.push([1])
        buffer.logprobs.append(ONE)
        assert buffer.shown == len(source.token_ids)
        assert buffer.pop_text() is None
        piece = buffer.pop()
        assert piece is not None
        assert (piece.text, list(piece.logprobs)) == ("x", [ONE])
    assert buffer.pop() is None


def test_parts_need_a_piece() -> None:
    """A PieceBuffer returns content as plain text if there is nothing else to return. If there are parts of another
    kind, such as reasoning, it returns a piece with all parts and their kinds."""
    text = ParsedText(PlainText())
    buffer = PieceBuffer(0, text, None, text)
    for kind, as_text in ((PartKind.CONTENT, None), (PartKind.REASONING, None), (PartKind.CONTENT, "ab")):
        text.push_parsed((1,), ParsedOutput([OutputPart(kind, "ab")]), False, False)
        assert buffer.pop_text() == as_text
        if as_text is None:
            piece = buffer.pop()
            assert piece is not None
            assert [(part.kind, part.text) for part in piece.parts] == [(kind, "ab")]
            assert piece.chars == 2


def test_a_restored_output_continues_after_the_delivered_text() -> None:
    """After a resume, no piece is marked as the first of the output, and an end that was delivered is not repeated."""
    begun, ended = (PieceBuffer(0, PlainText(), None, None) for _ in range(2))
    begun.restore([1, 2, 3], 2, False)
    assert begun.pop_text() == "x"
    begun.finish("length", "")
    piece = begun.pop()
    assert piece is not None
    assert not piece.first
    ended.restore([1, 2, 3], 3, True)
    ended.finish("stop", "")
    assert (ended.pop(), ended.delivered) == (None, 3)
