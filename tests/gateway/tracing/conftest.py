"""A trace collector, and gateways that send their spans to it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.otlp import Collector, running_collector


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """Run a trace collector on loopback."""
    async with running_collector() as running:
        yield running
