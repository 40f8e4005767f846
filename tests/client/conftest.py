"""Fixture of a scripted gateway for each test of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.scripted_gateway import Script, ScriptedGateway, serve


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    """A scripted gateway on a free port. The gateway is stopped after the test."""
    running = serve(Script())
    yield running
    running.stop()
