"""Retired deployment generations of a model: the gateway remembers the compatibility keys of their workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cluster.api.types import CompatibilityKey
from cluster.gateway.models.retired_generations import MAX_REMEMBERED, RetiredGenerations

OLD = CompatibilityKey("old", "sha256:b", "c")


def link(generation: str, key: CompatibilityKey = OLD, *, serves: bool = True) -> Any:
    """Return the link of a worker of this generation."""
    identity = SimpleNamespace(generation=generation)
    return SimpleNamespace(identity=identity, compatibility_key=key, takes_new_requests=serves)


def test_workers_of_a_retired_generation_leave() -> None:
    """A worker's compatibility key is remembered once its deployment generation was retired and the worker has left.
    The key is forgotten when a worker with the same key joins."""
    retired = RetiredGenerations()
    retired.left(link("g0"))
    assert not retired.had_compatible(OLD), "its generation was not retired"
    retired.update(["g1"], [link("g1")])
    assert not retired.had_compatible(OLD), "its worker has not left"
    retired.left(link("g1"))
    assert retired.had_compatible(OLD)
    retired.joined(link("g2"))
    assert not retired.had_compatible(OLD)


def test_a_replacement_is_rolled_back() -> None:
    """If a deployment is replaced and the replacement is then rolled back, the old deployment generation is no longer
    retired. Once one of its workers accepts new requests again, the generation is forgotten."""
    for serves in (True, False):
        retired = RetiredGenerations()
        retired.update(["g1"], [])
        retired.update([], [link("g1", serves=serves)])
        retired.left(link("g1"))
        assert retired.had_compatible(OLD) is not serves


def test_the_oldest_are_forgotten() -> None:
    """At most MAX_REMEMBERED keys are kept: the newest ones."""
    retired = RetiredGenerations()
    retired.update(["g1"], [])
    keys = [CompatibilityKey(f"w{number}", "sha256:b", "c") for number in range(MAX_REMEMBERED + 1)]
    for key in keys:
        retired.left(link("g1", key))
    assert [key for key in keys if not retired.had_compatible(key)] == keys[:1]
