"""JSON texts of float32 values. A text is parsed to the same float32, and is as short as numpy's."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.float_json import floats_json, short_floats
from cluster.gateway.apis.openai.vectors import embeddings

FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.integers(-(10**9), 10**9).map(lambda number: float(np.float32(number / 10**7))),
)


@given(st.lists(FLOATS, max_size=40))
def test_every_float32_has_its_shortest_text(values: list[float]) -> None:
    """The JSON text of a float32 reads back as the same float32. As a number, it equals the text that numpy writes."""
    numbers = np.array(values, "<f4")
    short = short_floats(numbers.tobytes())
    assert np.array_equal(np.array(short).astype("<f4"), numbers)
    assert short == [float(str(number)) for number in numbers]
    assert json.loads(floats_json(numbers.tobytes())) == short


def test_edges_of_the_range() -> None:
    """The smallest and the largest values, and both zeros, have the texts that numpy writes."""
    info = np.finfo(np.float32)
    values = np.array([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_subnormal, 16777217, 1e-14, 1e28], "<f4")
    assert [str(value) for value in short_floats(values.tobytes())] == [str(float(str(number))) for number in values]


@pytest.mark.parametrize("dimensions", [1, 7, 4096])
@pytest.mark.parametrize("is_base64", [False, True])
def test_vectors_are_written_in_order(dimensions: int, is_base64: bool) -> None:
    """The JSON of several vectors lists them in order. Each item has the right index and exactly the values of its
    vector."""
    values = np.random.default_rng(dimensions).normal(size=(9, dimensions)).astype("<f4")
    text = b",".join(embeddings([row.tobytes() for row in values], is_base64))
    items = json.loads(b"[" + text + b"]")
    assert [(item["object"], item["index"]) for item in items] == [("embedding", i) for i in range(9)]
    for item, row in zip(items, values, strict=True):
        found = item["embedding"]
        back = np.frombuffer(base64.b64decode(found), "<f4") if is_base64 else np.array(found, "<f4")
        assert np.array_equal(back, row)
