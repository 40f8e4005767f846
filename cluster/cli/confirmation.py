"""Confirmation of commands that remove or stop something."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli.base import USAGE, fail
from cluster.cli.terminal import safe

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]


def is_asked(yes: bool) -> bool:
    """Return whether `confirm` would ask the user."""
    return not yes and sys.stdin.isatty()


def confirm(question: str, yes: bool, *, required: bool = False) -> None:
    """Ask the user on the terminal. Any answer but yes ends the command with exit code 1.

    `yes`: do not ask. `required`: the command cannot be undone. If standard input is no terminal, the user cannot be
    asked: the command ends with exit code 2 if `required` is set, and continues otherwise.
    """
    if yes:
        return
    if is_asked(yes):
        typer.confirm(safe(question), abort=True, err=True)
    elif required:
        fail(f"{question} Standard input is no terminal: confirm with --yes", USAGE)
