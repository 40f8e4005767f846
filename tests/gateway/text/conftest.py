"""Fixtures for the tokenizers of all model families, which are built once per test session."""

from __future__ import annotations

import os

import pytest

from cluster.gateway.text.tokenizer import TextModel
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.gateway.text.kinds import Kind, kind_of
from tests.support.checkpoints import FAMILIES, build_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    """Build a tokenizer for each model family, once per test session. Returns the tokenizers by family."""
    from transformers import AutoTokenizer

    made = {}
    for family in FAMILIES:
        folder = build_checkpoint(family, tmp_path_factory.mktemp(family))
        ours = TextModel.from_bundle(build_bundle(folder))
        made[family] = kind_of(family, folder, AutoTokenizer.from_pretrained(folder), ours)
    return made


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest, kinds: dict[str, Kind]) -> Kind:
    """Return the tokenizers of one family. A test that uses this fixture runs once for each family."""
    return kinds[request.param]
