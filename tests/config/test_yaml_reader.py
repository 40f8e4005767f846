"""The YAML reader: equal keys are found wherever they stand, with their lines; everything else is PyYAML's."""

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
    """A reader that changed values would change configurations."""
    assert load(yaml.safe_dump(value)) == value


@given(value=st.dictionaries(st.text(min_size=1, max_size=6), VALUES, min_size=1, max_size=3), data=st.data())
def test_a_key_twice_is_found_at_any_depth(value: dict[str, Any], data: st.DataObject) -> None:
    """A duplicate that is not found loses what stood under the first of the two. (Quoted: all stands in one line.)"""
    key = data.draw(st.sampled_from(sorted(value)))
    again = yaml.safe_dump(
        {"outer": [{"inner": value}]}, default_flow_style=True, default_style='"', width=10**6
    ).strip()
    inside = yaml.safe_dump({key: 1}, default_flow_style=True, default_style='"', width=10**6).strip()[1:-1]
    text = again[: again.rindex("}}]}")] + f", {inside}}}}}]}}"
    (found,) = read(text).duplicates
    assert found.path == ("outer", 0, "inner", key)
    with pytest.raises(NotYaml, match="line 1: the key"):
        load(text)


def test_both_lines_are_named() -> None:
    """In a file of many models the line is how a key is found."""
    with pytest.raises(NotYaml, match="line 5: the key 'models' stands here again, first in line 2"):
        load("a: 1\nmodels:\n  - {name: x}\nb: 2\nmodels: []\n")
    assert read("a:\n  - b: 1\n    c: 2\n").line_of(("a", 0, "c", "deeper")) == 3


def test_merge_keys_and_aliases_are_no_duplicates() -> None:
    """YAML's own ways to say a thing once."""
    text = "base: &b {x: 1}\none: {<<: *b, y: 2}\ntwo: {<<: *b, x: 3}\nthree: *b\n"
    assert load(text) == {"base": {"x": 1}, "one": {"x": 1, "y": 2}, "two": {"x": 3}, "three": {"x": 1}}


@pytest.mark.parametrize("text", ["a: [", "\t", "a: 2024-99-99", "{[a]: b}", "a: !!python/object:x {}", "[" * 100])
def test_what_is_not_yaml_is_said_in_one_line(text: str) -> None:
    """Whatever the parser raises, the command prints a line and no traceback."""
    with pytest.raises(NotYaml) as caught:
        load(text)
    assert "\n" not in str(caught.value)


def test_several_documents() -> None:
    """`apply` takes files of several; a duplicate in any of them is found."""
    assert load_documents("a: 1\n---\n---\nb: 2\n") == [{"a": 1}, None, {"b": 2}]
    with pytest.raises(NotYaml, match="line 4"):
        load_documents("a: 1\n---\nb: 2\nb: 3\n")
