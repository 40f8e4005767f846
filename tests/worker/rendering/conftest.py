"""Fixtures of the tests of prompt rendering."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.worker.rendering.kit import RendererKit, renderer_tokenizer
from tests.support.rendered_models import ARCHITECTURES, build_rendered

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("VLLM_SYSTEM_START_DATE", "2026-01-01")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def kit(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Any, RendererKit]]:
    """The name of a renderer, its tokenizer, and its RendererKit."""
    folder: Path = build_rendered(request.param, tmp_path_factory.mktemp(request.param))
    tokenizer = renderer_tokenizer(request.param, str(folder))
    made = RendererKit(request.param, tokenizer, str(folder))
    yield request.param, tokenizer, made
    made.close()
