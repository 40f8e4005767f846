"""Fixtures of the worker tests: a cluster on the simulated engine, and a gateway's side of the links."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.conftest import bundle, checkpoint, cluster
from tests.support.serving import Door, open_door

__all__ = ["bundle", "checkpoint", "cluster"]


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """A gateway's side of the links, on a loopback port."""
    async with open_door() as opened:
        yield opened
