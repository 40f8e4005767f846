"""Debian's Chromium, started for the scenario `console`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from playwright.async_api import Browser, expect

from cluster.cli.commands import doctor
from tests.support import browser as browsers

LATEST_MS = 60_000
"""Longest wait in milliseconds for something that a page must show. The limit serves only to end a hang."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run Chromium without a window. Raises RuntimeError if this machine has none."""
    if doctor.check_chromium().missing:
        raise RuntimeError(doctor.missing_reason("chromium"))
    expect.set_options(timeout=LATEST_MS)
    async with browsers.chromium() as running:
        yield running
