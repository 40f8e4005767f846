"""Fixtures for CLI tests: a scripted gateway with the gRPC and admin APIs, a command runner, and a cache folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.all_commands import app
from tests.support.scripted_gateway import Script, ScriptedGateway, serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use temporary folders for the cache and for contexts, and ignore the HEADRACE environment variables of the
    user."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("HEADRACE_ENDPOINT", "HEADRACE_API_KEY", "HEADRACE_CONFIG", "HEADRACE_TLS_CA", "HEADRACE_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    """A scripted gateway on a free port. The gateway is stopped at the end of the test."""
    server = serve(Script())
    yield server
    server.stop()


@pytest.fixture
def run() -> Callable[..., Result]:
    """Function that runs the command line in this process. The argument `input` is the user's input."""

    def invoke(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=input)

    return invoke
