"""Setting keys of a model in a YAML text changes nothing else in the text."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli.pinning import set_keys

FILE = """\
# what we run
api_version: headrace/v1
models:
  # the large one
  - name: big          # tenants know it as default
    source: hf://org/big   # ours
    replicas: {min: 2}
  - {name: small, source: "hf://org/small", revision: old}  # flow
  - name: last
    revision: 'x'
    source: /last"""
DIGEST = "sha256:" + "0" * 64


def test_block_and_flow() -> None:
    """A new key is inserted below `source`, the value of an existing key is replaced, and comments stay."""
    text = set_keys(FILE, "big", {"revision": "abc", "digest": DIGEST})
    text = set_keys(text, "small", {"revision": "123", "digest": DIGEST})
    text = set_keys(text, "last", {"revision": "y"})
    assert (
        text
        == f"""\
# what we run
api_version: headrace/v1
models:
  # the large one
  - name: big          # tenants know it as default
    source: hf://org/big   # ours
    digest: "{DIGEST}"
    revision: abc
    replicas: {{min: 2}}
  - {{name: small, source: "hf://org/small", digest: "{DIGEST}", revision: "123"}}  # flow
  - name: last
    revision: y
    source: /last"""
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [{name: other, source: /m}]", "no entry 'm'"),
        ("models: {", "not YAML"),
        ("a: &a {name: m, source: /m}\nmodels: [*a]", "edit it by hand"),
        ("models: [{name: m, source: /m, revision: [1]}]", "must be a plain value"),
    ],
)
def test_what_cannot_be_cut_is_refused(text: str, message: str) -> None:
    """A text is refused if a key cannot be set in it without damage to other parts."""
    with pytest.raises(ValueError, match=message):
        set_keys(text, "m", {"revision": "r"})


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=12)


@settings(deadline=None)
@given(WORDS, st.booleans(), st.lists(st.sampled_from(["# c", "", "  # d"]), max_size=3))
def test_whatever_the_value_and_the_layout(value: str, flow: bool, noise: list[str]) -> None:
    """Any value can be set in any layout: the new text has the value, and all other lines stay."""
    entry = "{name: m, source: /m}" if flow else "name: m\n    source: /m\n    gpu: L4"
    text = "\n".join([*noise, "models:", f"  - {entry}", *noise, "name: x"])
    changed = set_keys(text, "m", {"revision": value})
    assert yaml.safe_load(changed)["models"][0]["revision"] == value
    assert set(changed.splitlines()) >= {line for line in text.splitlines() if "source" not in line}
    assert set_keys(changed, "m", {"revision": value}) == changed
