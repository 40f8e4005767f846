"""Fixtures for a cluster with simulated engines in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, bundle_of, running_cluster


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide the folder of a tiny checkpoint, whose tokenizer the simulated engine uses."""
    return build_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bundle(checkpoint: Path) -> Bundle:
    """Provide the tokenizer bundle of the checkpoint."""
    return bundle_of(checkpoint)


@pytest.fixture
async def watchful(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Provide a running gateway without workers. It detects a failed worker within the default time."""
    async with running_cluster(tmp_path, timing=Timing()) as cluster:
        yield cluster


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Provide a running gateway without workers."""
    async with running_cluster(tmp_path) as cluster:
        yield cluster
