"""One Chromium for all tests of the console's pages."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from tests.support.browser import chromium


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Provide a running Chromium."""
    async with chromium() as running:
        yield running
