"""Tests of replica settings: conversion to JSON and back, and the digest, whose change requires new replicas. Also a
test that finds the reason of a refused model in Ray's error text."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import ModelSpec
from cluster.policy.catalog import specs
from cluster.wire.tls import TlsFiles
from cluster.worker.settings import ModelRefused, ReplicaSettings, find_refusal, from_json

SETTINGS = ReplicaSettings(
    ModelSpec(name="m", source="hf://a/b", aliases=("x", "y"), engine={"max_num_seqs": 8}, min_replicas=2),
    cluster="prod",
    gateways=("10.0.0.1:50052",),
    tls=TlsFiles(Path("/c"), Path("/k"), Path("/a")),
    environment={"A": "b"},
)


def test_settings_survive_json() -> None:
    """Settings converted to JSON and back are equal to the original settings."""
    assert from_json(json.loads(json.dumps(SETTINGS.to_json()))) == SETTINGS
    for changed in (dataclasses.replace(SETTINGS, tls=None), dataclasses.replace(SETTINGS, max_gateways=3)):
        assert from_json(changed.to_json()) == changed


def test_unknown_keys_are_refused() -> None:
    """An unknown key, as from another release, raises an error and is not ignored."""
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        specs.from_json({**specs.to_json(SETTINGS.spec), "colour": "red"})
    with pytest.raises(TypeError, match="colour"):
        from_json({**SETTINGS.to_json(), "colour": "red"})


@pytest.mark.parametrize(
    "change",
    [{"aliases": ()}, {"min_replicas": 1}, {"max_replicas": 9}, {"idle_s": 5.0}, {"sampling": {"temperature": 0.2}}],
)
def test_what_replicas_never_see_restarts_none(change: dict[str, Any]) -> None:
    """Aliases, replica counts and sampling defaults are not part of the digest, so their change restarts no replica."""
    assert dataclasses.replace(SETTINGS, spec=dataclasses.replace(SETTINGS.spec, **change)).digest == SETTINGS.digest


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(SETTINGS, gateways=("10.0.0.2:50052",)),
        dataclasses.replace(SETTINGS, tls=None),
        dataclasses.replace(SETTINGS, spec=dataclasses.replace(SETTINGS.spec, dtype="float32")),
        dataclasses.replace(SETTINGS, spec=dataclasses.replace(SETTINGS.spec, engine={"max_num_seqs": 9})),
        dataclasses.replace(SETTINGS, spec=dataclasses.replace(SETTINGS.spec, control_tokens_in_content="escape")),
    ],
)
def test_what_replicas_are_started_with_makes_them_anew(changed: ReplicaSettings) -> None:
    """If any setting with which a replica is started changes, the digest of the settings changes too."""
    assert changed.digest != SETTINGS.digest


@given(st.text())
def test_refusal_is_found_again(reason: str) -> None:
    """The reason of ModelRefused is found in the longer error text that Ray makes. The reason survives pickling."""
    wrapped = f"Traceback (most recent call last):\n  ...\nray.X: {ModelRefused(reason)}\nand 1 more time(s)"
    assert find_refusal(wrapped) == reason
    assert find_refusal("Traceback: ValueError") == ""
    assert pickle.loads(pickle.dumps(ModelRefused(reason))).reason == reason  # noqa: S301 - our own
