"""A process of the cluster starts without importing modules that only other commands need."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from cluster.cli import all_commands, process_commands
from cluster.cli.main import PROCESSES
from loadtests.children import ROOT

PROGRAM = """
import sys
sys.argv = ["headrace", *{words!r}, "--help"]
from cluster.cli.main import main
try:
    main()
except SystemExit:
    pass
imported = [name for name in ("rich", "pygments", "cluster.cli.all_commands") if name in sys.modules]
print("imports", *imported)
"""


def _names(app: typer.Typer) -> set[str]:
    own = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return own | {group.name or "" for group in app.registered_groups}


def test_what_starts_alone_is_what_there_is_to_start() -> None:
    """Each kind of process can be started by a program of its own, and by a command of `headrace`."""
    assert {name: _names(process_commands.app_of(name)) >= {name} for name in PROCESSES} == dict.fromkeys(
        PROCESSES, True
    )
    assert _names(process_commands.app_of("gateway")) | {process_commands.POD} == set(PROCESSES)
    assert set(PROCESSES) <= _names(all_commands.app)


@pytest.mark.parametrize("words", [["gateway"], ["controller"], ["pod", "gateway"], ["prepare"]])
def test_a_process_imports_no_console(words: list[str]) -> None:
    """A command that runs a process of the cluster, such as a gateway, does not import rich, pygments or the modules of
    other commands when it prints its help."""
    program = PROGRAM.format(words=words)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "--file" in done.stdout
    assert done.stdout.splitlines()[-1] == "imports"


@pytest.mark.slow
def test_another_command_has_all() -> None:
    """The command `chat` imports rich, pygments and all commands. This shows that `test_a_process_imports_no_console`
    can fail."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(words=["chat"])], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1].split()[1:] == ["rich", "pygments", "cluster.cli.all_commands"]
