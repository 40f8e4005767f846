"""Fixtures for CLI tests: a scripted gateway that serves both APIs, a command runner, and a temporary cache folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.all_commands import app
from tests.support.scripted_gateway import Script, ScriptedGateway, serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary cache folder, so that run folders of these tests are not among the user's."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HEADRACE_ENDPOINT", "HEADRACE_API_KEY", "HEADRACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    """A scripted gateway on a free port, stopped at the end of the test."""
    server = serve(Script())
    yield server
    server.stop()


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process; `input` is what the user types."""

    def invoke(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=input)

    return invoke
