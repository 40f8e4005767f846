"""A warning of the commands for tenants, keys and usage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

FILE = "api_version: headrace/v1\nname: c\nmodels: []\n"


@pytest.mark.parametrize("command", [("tenants", "list"), ("usage",)])
def test_a_cluster_without_auth(run: Callable[..., Result], tmp_path: Path, command: tuple[str, ...]) -> None:
    """If the configuration has no section `auth`, the commands say that nothing is checked and recorded."""
    file = tmp_path / "cluster.yaml"
    for text, warns in ((FILE, True), (FILE + "auth: {api_keys: {pepper_file: /nowhere}}\n", False)):
        file.write_text(text)
        done = run(*command, "-f", str(file))
        assert done.exit_code == 0, done.output
        assert ("check no keys and record no usage" in done.stderr) == warns
