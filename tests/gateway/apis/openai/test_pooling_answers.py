"""Tests of the JSON of rankings, which the gateway writes in pieces."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.openai.pooling_answers import PIECE_CHARS, ranking_json
from cluster.gateway.apis.pooling_scores import Ranked

TEXTS = st.none() | st.builds(
    lambda text, times: text * times, st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.integers(0, 99)
)


@given(st.lists(st.tuples(TEXTS, st.floats(-1, 1)), max_size=5))
def test_a_ranking_is_json(documents: list[tuple[str | None, float]]) -> None:
    """The pieces add up to a JSON list of the entries in order, whatever the documents hold."""
    results = [Ranked(i, score, text) for i, (text, score) in enumerate(documents)]
    assert json.loads(b"[" + b"".join(ranking_json(results)) + b"]") == [
        {"index": i, **({} if text is None else {"document": {"text": text}}), "relevance_score": score}
        for i, (text, score) in enumerate(documents)
    ]


def test_a_long_document_is_written_in_pieces() -> None:
    """A long document is written in several short pieces, so other tasks can run between them."""
    text = "é\x01🎉a" * PIECE_CHARS
    pieces = list(ranking_json([Ranked(0, 0.5, text)]))
    assert max(map(len, pieces)) <= 12 * PIECE_CHARS
    assert json.loads(b"".join(pieces))["document"]["text"] == text
