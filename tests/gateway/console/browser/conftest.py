"""One Chromium for all tests of the console's pages, and the consoles of two clusters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from tests.support.browser import chromium
from tests.support.console_pages import ConsolePages, add_workers, console_pages


@pytest.fixture(scope="package")
async def browser() -> AsyncIterator[Browser]:
    """Provide a running Chromium."""
    async with chromium() as running:
        yield running


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[ConsolePages]:
    """Provide the console of a gateway with 20 simulated workers. The gateway detects a failed worker at once."""
    async with console_pages(tmp_path_factory.mktemp("busy"), browser, timing=Timing()) as pages:
        await add_workers(pages.cluster, checkpoint, bundle, 20, decode_ms=20)
        yield pages


@pytest.fixture(scope="module")
async def empty(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> AsyncIterator[ConsolePages]:
    """Provide the console of a gateway without workers, tenants and calls."""
    async with console_pages(tmp_path_factory.mktemp("empty"), browser) as pages:
        yield pages
