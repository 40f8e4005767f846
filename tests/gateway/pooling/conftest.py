"""Fixture of a gateway with pooling workers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.wire.bundle import Bundle
from tests.support.cluster import TestCluster
from tests.support.pooling import pooling_cluster


@pytest.fixture(scope="module")
async def pooling(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Provide a gateway with the models `embed`, `score` and `sim`."""
    async with pooling_cluster(tmp_path_factory.mktemp("pooling"), checkpoint, bundle) as cluster:
        yield cluster
        await cluster.until_idle()
