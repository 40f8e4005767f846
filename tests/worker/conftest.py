"""Fixtures of the worker tests: a cluster on the simulated engine, the gateway side of the links, and a cleanup of
engines after failed tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.conftest import bundle, checkpoint, cluster
from tests.support.serving import Door, open_door
from tests.worker.engine.contract import abort_unfinished

__all__ = ["bundle", "checkpoint", "cluster"]


@pytest.fixture(autouse=True)
async def _shared_engines_are_left_empty() -> AsyncIterator[None]:
    """Abort the requests that a failed test has left in an engine. Other tests share the engine."""
    yield
    await abort_unfinished()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Provide the gateway side of the links, on a loopback port."""
    async with open_door() as opened:
        yield opened
