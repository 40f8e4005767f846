"""Help texts fit a terminal of 80 columns and describe every option."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from typer.testing import Result

from cluster import __version__
from cluster.cli.all_commands import app
from cluster.cli.base import DIFFERS, FAILED, OK, UNREACHABLE_CODE, USAGE
from loadtests.children import ROOT

Run = Callable[..., Result]
COLUMNS = 80
MARGINS = 8


def _commands(command: Any, path: str = "headrace") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from _commands(inner, f"{path} {name}")


ALL = dict(_commands(typer.main.get_command(app)))


def test_summaries_are_not_cut() -> None:
    """In a list of commands each summary fits into its line."""
    groups = [command.commands for command in ALL.values() if getattr(command, "commands", None)]
    cut = []
    for commands in groups:
        shown = {name: inner for name, inner in commands.items() if not inner.hidden}
        width = COLUMNS - MARGINS - max(map(len, shown))
        cut += [text for inner in shown.values() if (text := inner.get_short_help_str(width)).endswith("...")]
    assert cut == []


@pytest.mark.parametrize("path", ALL)
def test_every_option_is_described(path: str) -> None:
    """Each option and argument of each command has a help text."""
    command = ALL[path]
    assert command.help
    lacking = [p.name for p in command.params if not getattr(p, "hidden", False) and not getattr(p, "help", None)]
    assert lacking == []


def test_the_first_page_has_the_exit_codes(run: Run) -> None:
    """The first page of --help names every exit code and every variable that selects a cluster."""
    page = " ".join(run("--help").stdout.split())
    assert (OK, FAILED, USAGE, UNREACHABLE_CODE, DIFFERS) == (0, 1, 2, 3, 4)
    for part in ("0 ok", "1 failed", "2 bad usage or configuration", "3 unreachable", "4 differs"):
        assert part in page
    for name in ("ENDPOINT", "API_KEY", "TLS_CA", "CONTEXT", "CONFIG"):
        assert f"HEADRACE_{name}" in page


@pytest.mark.slow
def test_exit_codes_are_uniform(run: Run) -> None:
    """Bad usage is exit code 2 for every command, and an unreachable gateway is exit code 3."""
    for wrong in (("nope",), ("models", "nope"), ("scale", "m"), ("status", "--nope"), ("config", "check", "/none")):
        assert run(*wrong).exit_code == USAGE, wrong
    nowhere = "127.0.0.1:1"
    for verb in (("status",), ("scale", "m", "1"), ("tenants", "list"), ("explain", "request", "x"), ("drain", "w")):
        assert run(*verb, "--admin", nowhere).exit_code == UNREACHABLE_CODE, verb
    for verb in (("models",), ("chat", "m", "hi")):
        assert run(*verb, "--endpoint", nowhere).exit_code == UNREACHABLE_CODE, verb


def test_an_option_before_the_subcommand_is_not_ignored(run: Run) -> None:
    """`models --endpoint X get m` is refused: the option belongs behind `get`."""
    done = run("models", "--endpoint", "127.0.0.1:1", "get", "m")
    assert done.exit_code == USAGE
    assert "--endpoint belongs behind `get`" in done.stderr


def test_version_in_three_forms(run: Run) -> None:
    """`--version`, `version` and `version --json` print the same version."""
    assert run("--version").stdout == f"headrace {__version__}\n"
    assert run("version").stdout.splitlines()[0] == f"headrace {__version__}"
    assert f'"headrace": "{__version__}"' in run("version", "--json").stdout


def _headrace(*arguments: str, **environment: str) -> str:
    command = [sys.executable, "-m", "cluster.cli.main", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, **environment}
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_of_a_shell(shell: str) -> None:
    """`completion SHELL` prints a shell script that gets the completions from `headrace`."""
    script = _headrace("completion", shell)
    assert f"_HEADRACE_COMPLETE=complete_{shell}" in script
    assert "headrace" in script


@pytest.mark.slow
def test_completion_knows_commands_and_contexts() -> None:
    """Completion offers the commands and, after `context use`, the names of contexts."""
    words = {"_HEADRACE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert _headrace(COMP_WORDS="headrace unco", **words).split() == ["uncordon"]
    _headrace("context", "add", "prod-eu", "--endpoint", "a.example:1")
    words["COMP_CWORD"] = "3"
    assert _headrace(COMP_WORDS="headrace context use pr", **words).split() == ["prod-eu"]
