"""A scripted gateway that answers both APIs, a runner, and a cache folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.all_commands import app
from tests.support.scripted_gateway import Script, ScriptedGateway, serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run folders of these tests are not the user's."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HEADRACE_ENDPOINT", "HEADRACE_API_KEY", "HEADRACE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    """A server on a free port, ended with the test."""
    running = serve(Script())
    yield running
    running.stop()


@pytest.fixture
def run() -> Callable[..., Result]:
    """Runs the command line in this process; `input` is what the user types."""

    def invoke(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=input)

    return invoke
