"""Commands that remove or stop something ask for confirmation, but only on a terminal."""

from __future__ import annotations

import io
import os
import pty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import Result

from cluster.admin.v1 import catalog_pb2
from cluster.cli.all_commands import app
from tests.support.scripted_gateway import ScriptedGateway

Run = Callable[..., Result]
Answer = Callable[..., int]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answer]:
    """Function that runs a command with a terminal as standard input, and returns the exit code. Its argument `typed`
    is what the user types."""
    ours, terminal = pty.openpty()
    with io.TextIOWrapper(os.fdopen(terminal, "rb", buffering=0)) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)

        def run(typed: str, *arguments: str) -> int:
            os.write(ours, typed.encode())
            try:
                app(arguments, prog_name="headrace")
            except SystemExit as ended:
                return int(ended.code or 0)
            return 0

        yield run
    os.close(ours)


def test_a_refused_question_changes_nothing(
    answer: Answer, gateway: ScriptedGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    """`scale MODEL 0` asks for confirmation and names the gateway.

    After the answer no, it exits with 1 and sends nothing. With another number or with --yes, no question is asked.
    """
    at = ("--admin", gateway.endpoint)
    assert answer("n\n", "scale", "m", "0", *at) == 1
    assert gateway.script.requests == []
    asked = capsys.readouterr().err
    assert f"Stop all replicas of m at {gateway.endpoint}?" in asked
    assert answer("y\n", "scale", "m", "0", *at) == 0
    assert answer("", "scale", "m", "0", "--yes", *at) == 0
    assert answer("", "scale", "m", "2", *at) == 0
    assert answer("", "scale", "m", "auto", *at) == 0
    assert len(gateway.script.requests) == 4


def test_apply_asks_only_for_what_it_removes(
    answer: Answer, gateway: ScriptedGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`apply --prune` asks only if models would be removed, and names them. Without --prune, `apply` never asks."""
    file = tmp_path / "models.yaml"
    file.write_text("models: [{name: m, source: /m}]\n")
    at = ("-f", str(file), "--admin", gateway.endpoint)
    gateway.script.changes = [catalog_pb2.Change(model="old", kind="remove")]
    assert answer("n\n", "apply", "--prune", *at) == 1
    assert "Remove old from" in capsys.readouterr().err
    assert not any(isinstance(request, catalog_pb2.ApplyRequest) for request in gateway.script.requests)
    assert answer("", "apply", *at) == 0
    gateway.script.changes = [catalog_pb2.Change(model="m", kind="change")]
    assert answer("", "apply", "--prune", *at) == 0


def test_nobody_is_asked_without_a_terminal(run: Run, gateway: ScriptedGateway) -> None:
    """Without a terminal, no command asks a question. An irreversible command is then refused unless it gets `--yes`;
    other commands run."""
    assert run("scale", "m", "0", "--admin", gateway.endpoint).exit_code == 0
    refused = run("tenants", "delete", "acme", "--erase", "--reason", "x")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr


def test_these_commands_have_the_option() -> None:
    """Exactly the commands that ask for confirmation have the option --yes."""

    def having(command: object, path: tuple[str, ...]) -> Iterator[str]:
        if any("--yes" in parameter.opts for parameter in getattr(command, "params", ())):
            yield " ".join(path)
        for name, inner in getattr(command, "commands", {}).items():
            yield from having(inner, (*path, name))

    assert set(having(typer.main.get_command(app), ())) == {
        "adapters unload", "apply", "db upgrade", "down", "keys revoke", "scale", "tenants delete", "tenants suspend",
    }  # fmt: skip
