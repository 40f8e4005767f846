"""Tests that the YAML reader finds duplicate keys at any depth, with their lines, and otherwise reads like PyYAML."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.yaml_reader import NotYaml, load, load_documents, read

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=10,
)


@given(value=VALUES)
def test_what_has_no_key_twice_reads_as_ever(value: Any) -> None:
    """Documents without duplicate keys have the values that PyYAML reads."""
    assert load(yaml.safe_dump(value)) == value


@given(value=st.dictionaries(st.text(min_size=1, max_size=6), VALUES, min_size=1, max_size=3), data=st.data())
def test_a_key_twice_is_found_at_any_depth(value: dict[str, Any], data: st.DataObject) -> None:
    """A duplicate key is found at any depth, and the error names its line. The test writes each document on one line,
    so the line is 1."""
    key = data.draw(st.sampled_from(sorted(value)))
    dumped = yaml.safe_dump(
        {"outer": [{"inner": value}]}, default_flow_style=True, default_style='"', width=10**6
    ).strip()
    duplicate = yaml.safe_dump({key: 1}, default_flow_style=True, default_style='"', width=10**6).strip()[1:-1]
    text = dumped[: dumped.rindex("}}]}")] + f", {duplicate}}}}}]}}"
    (found,) = read(text).duplicates
    assert found.path == ("outer", 0, "inner", key)
    with pytest.raises(NotYaml, match="line 1: the key"):
        load(text)


def test_both_lines_are_named() -> None:
    """The error for a duplicate key names the lines of both keys. A path without an entry has the line of its nearest
    parent."""
    with pytest.raises(NotYaml, match="line 5: the key 'models' appears again here, first in line 2"):
        load("a: 1\nmodels:\n  - {name: x}\nb: 2\nmodels: []\n")
    assert read("a:\n  - b: 1\n    c: 2\n").line_of(("a", 0, "c", "deeper")) == 3


def test_merge_keys_and_aliases_are_no_duplicates() -> None:
    """Merge keys and aliases are not reported as duplicate keys."""
    text = "base: &b {x: 1}\none: {<<: *b, y: 2}\ntwo: {<<: *b, x: 3}\nthree: *b\n"
    assert load(text) == {"base": {"x": 1}, "one": {"x": 1, "y": 2}, "two": {"x": 3}, "three": {"x": 1}}


@pytest.mark.parametrize("text", ["a: [", "\t", "a: 2024-99-99", "{[a]: b}", "a: !!python/object:x {}", "[" * 100])
def test_what_is_not_yaml_is_said_in_one_line(text: str) -> None:
    """The error for a text that is not YAML is one line, whatever the parser raises."""
    with pytest.raises(NotYaml) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_several_documents() -> None:
    """A text may have several documents. A duplicate key is found in any of them."""
    assert load_documents("a: 1\n---\n---\nb: 2\n") == [{"a": 1}, None, {"b": 2}]
    with pytest.raises(NotYaml, match="line 4"):
        load_documents("a: 1\n---\nb: 2\nb: 3\n")
