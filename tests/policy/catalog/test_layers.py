"""Tests of the merging of layered catalog files, and of the differences between two catalogs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.catalog import Change, Difference
from cluster.policy.catalog.layers import apply_entries, diff, merge_layers, promote_canary

NAMES = st.sampled_from(["a", "b", "c"])
VALUES = st.one_of(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=2))
SECTIONS = st.dictionaries(st.sampled_from("xyz"), VALUES, max_size=3)
ENTRIES = st.dictionaries(st.sampled_from(["k", "l"]), st.one_of(VALUES, SECTIONS), max_size=2)
LAYERS = st.dictionaries(NAMES, ENTRIES, max_size=3).map(
    lambda models: [{"name": name, **entry} for name, entry in models.items()]
)


def test_a_layer_changes_what_it_names() -> None:
    """Mappings are merged by key, lists are replaced as a whole, and null removes a key. Models keep the order in which
    they first occur."""
    base: list[dict[str, Any]] = [
        {"name": "m", "source": "/m", "aliases": ["a", "b"], "replicas": {"min": 1, "max": 2}},
        {"name": "n"},
    ]
    over: list[dict[str, Any]] = [{"name": "m", "aliases": ["c"], "replicas": {"max": 9}, "source": None}]
    assert merge_layers([base, over]) == (
        {"name": "m", "aliases": ["c"], "replicas": {"min": 1, "max": 9}},
        {"name": "n"},
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [([[{"source": "/m"}]], "layer 1: models[0]: has no name"), ([[], [{"name": "m"}] * 2], "layer 2: .* twice")],
)
def test_what_cannot_be_laid(layers: list[list[dict[str, Any]]], message: str) -> None:
    """The error for an invalid layer names the layer and the catalog entry."""
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        merge_layers(layers)


@given(LAYERS, LAYERS, LAYERS)
def test_layers_can_be_laid_in_any_grouping(
    one: list[dict[str, Any]], two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    """Merging is associative. Merging a layer with itself or with an empty layer changes nothing."""
    assert merge_layers([one, two, three]) == merge_layers([merge_layers([one, two]), three])
    assert merge_layers([one, one, []]) == merge_layers([one])


@given(LAYERS, LAYERS, st.booleans())
def test_applying_again_changes_nothing(now: list[dict[str, Any]], given_: list[dict[str, Any]], prune: bool) -> None:
    """Entries that are applied are in the catalog unchanged. With `prune` the other entries are removed, otherwise they
    stay. Applying the same entries again changes nothing."""
    after = apply_entries(now, given_, prune=prune)
    assert apply_entries(after, given_, prune=prune) == after
    by_name = {entry["name"]: entry for entry in after}
    assert all(by_name[entry["name"]] == entry for entry in given_)
    others = [entry for entry in now if entry["name"] not in {one["name"] for one in given_}]
    assert all((by_name.get(entry["name"]) == entry) is not prune for entry in others)
    before = {entry["name"]: entry for entry in now}
    assert not diff(by_name, by_name, {})
    touched = {change.model for change in diff(before, by_name, {})}
    assert touched == {name for name in before.keys() | by_name.keys() if before.get(name) != by_name.get(name)}


def test_changes_are_told_key_by_key() -> None:
    """Changes are listed with the paths of the changed keys and with the reason if a restart is needed."""
    now: dict[str, dict[str, Any]] = {
        "m": {"name": "m", "replicas": {"min": 1}, "revision": "a"},
        "old": {"name": "old"},
    }
    then: dict[str, dict[str, Any]] = {
        "m": {"name": "m", "replicas": {"min": 1, "max": 3}, "revision": "b"},
        "new": {"name": "new"},
    }
    assert diff(now, then, {"m": "why"}) == (
        Change("m", "change", (Difference("replicas.max", None, 3), Difference("revision", "a", "b")), "why"),
        Change("new", "add"),
        Change("old", "remove"),
    )


def test_a_canary_takes_the_models_place() -> None:
    """When a canary is promoted, the keys that its entry sets replace those of the model. The digest of the old weights
    is removed from the model's entry."""
    entry = {"name": "m", "source": "/m", "digest": "sha256:old", "revision": "a", "fallback": ["n"]}
    canary = {"version": "v2", "revision": "b", "weight": 0.5, "rollback": {}}
    assert promote_canary({**entry, "canary": canary}) == {
        "name": "m", "source": "/m", "version": "v2", "revision": "b", "fallback": ["n"],
    }  # fmt: skip
