"""Fixtures of the parser tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.worker.parsing.formats import build_folder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that has the special tokens of all formats."""
    return build_folder(tmp_path_factory.mktemp("parsing"))
