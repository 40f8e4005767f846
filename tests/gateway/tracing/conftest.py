"""A collector, and gateways that send their spans there."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.otlp import Collector, running_collector


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """Run a collector on loopback."""
    async with running_collector() as running:
        yield running
