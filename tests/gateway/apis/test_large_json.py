"""Counting and parsing of large JSON texts, with the same results as the module json."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.apis.json_values import COUNTED_BYTES, MAX_DEPTH, is_deeper, parse
from cluster.gateway.apis.large_json import count_of, decode

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
PIECES = (
    *('{"a":1,"a":[2],"b":{}}', '"\\ud800"'),
    *('"\\ud83d\\ude00"', '"\\u0000"', '"\\x"', '"\x01"', '"\x7f"', '"é"', '"\ud800"'),
    *("1e400", "-0", "-0.0", "01", "1.", "1E+2", "5e-324", "123456789012345678901234567890"),
    *("NaN", "-Infinity", "1" * 5000),
    *("[", "]", "{", "}", ",", ":", '"', "\\", " ", "\t", "\n", "\r", "\f", "\ufeff", "\xa0", "true", "nul", '"k":'),
)  # fmt: skip


def exact(value: Any) -> Any:
    """Return a form of the value for exact comparison, in which types, the order of members and the signs of zeros
    count."""
    if isinstance(value, dict):
        return [(name, exact(item)) for name, item in value.items()]
    return [exact(item) for item in value] if isinstance(value, list) else (type(value), repr(value))


def agrees(data: bytes) -> None:
    """Check that `data` is either not decoded, or decoded to the same value as by Python's module `json`."""
    if (decoded := decode(data)) is None:
        return
    assert exact(decoded[0]) == exact(json.loads(data.decode()))


@pytest.mark.slow
@settings(max_examples=500)
@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_written_json_is_decoded_alike(value: Any, ascii_only: bool, indent: int | None) -> None:
    """A text that the module json has written is decoded to the same value as by that module."""
    agrees(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass"))


@pytest.mark.slow
@settings(max_examples=1000)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
@example(pieces=["[" * 300, "]" * 300])
def test_odd_texts_are_decoded_alike(pieces: list[str]) -> None:
    """For texts of random JSON tokens, valid or not, `decode` returns the value that the module json returns, or leaves
    the text to that module."""
    for text in ("".join(pieces), f"[{','.join(pieces)}]"):
        agrees(text.encode("utf-8", "surrogatepass"))


@given(value=VALUES, at=st.integers(0, 200), byte=st.integers(0, 255))
def test_spoilt_bytes_are_decoded_alike(value: Any, at: int, byte: int) -> None:
    """A JSON text with one wrong byte is decoded to the same value as by Python's module `json`, or not decoded at all.
    The text may be invalid UTF-8."""
    data = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    data[at % len(data)] = byte
    agrees(bytes(data))


def outcome(data: bytes, levels: int) -> Any:
    """Return what `parse` returns, or the message of its error."""
    try:
        return exact(parse("field", data, None, levels))
    except CallError as error:
        return error.message


@given(value=VALUES, levels=st.integers(1, 4), spoilt=st.sampled_from([b"", b",", b"NaN", b"\xff"]))
def test_the_length_of_a_text_does_not_matter(value: Any, levels: int, spoilt: bytes) -> None:
    """White space that makes a text large changes neither the value nor the error, except for positions in errors."""
    data = json.dumps(value).encode() + spoilt
    short, long = outcome(data, levels), outcome(data + b" " * COUNTED_BYTES, levels)
    if isinstance(short, str):
        assert isinstance(long, str)
        assert short.partition("byte")[0].partition("(char")[0] == long.partition("byte")[0].partition("(char")[0]
    else:
        assert long == short


@pytest.mark.parametrize(
    ("value", "depth"), [(None, 0), (1, 0), ("text", 0), ([], 1), ({}, 1), ([[]], 2), ({"a": [{}]}, 3)]
)
def test_depth(value: Any, depth: int) -> None:
    """`is_deeper` is true for every number of levels that is less than the depth of the value, and for no other
    number."""
    assert [is_deeper(value, levels) for levels in range(5)] == [levels < depth for levels in range(5)]
    assert not is_deeper(value, MAX_DEPTH)


@given(text=st.binary(max_size=200), characters=st.sets(st.sampled_from(b'[{,"a'), min_size=1))
def test_counts(text: bytes, characters: set[int]) -> None:
    """`count_of` gives the same number of characters as `bytes.count`, for bytes and for a bytearray."""
    expected = sum(text.count(bytes([character])) for character in characters)
    assert count_of(bytes(characters), text) == expected
    assert count_of(bytes(characters), bytearray(text)) == expected
