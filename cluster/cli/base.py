"""Helpers shared by processes and commands: configuration files, exit codes and one-line error messages."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.cli.terminal import safe
from cluster.config.document import ConfigError, load
from cluster.config.lenient import PartialConfig
from cluster.config.schema import Config

OK, FAILED, USAGE, UNREACHABLE_CODE, DIFFERS = 0, 1, 2, 3, 4
EXIT_CODES = "Exit codes: 0 ok, 1 failed, 2 bad usage or configuration, 3 unreachable, 4 differs."
FileOption = Annotated[
    Path, typer.Option("-f", "--file", envvar="HEADRACE_CONFIG", help="The cluster.yaml.", show_default=False)
]


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Print an error to standard error and exit with the exit code `code`."""
    typer.echo(f"{typer.style('error:', fg=typer.colors.RED)} {safe(message)}", err=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print a warning of a likely mistake to standard error."""
    typer.echo(f"{typer.style('warning:', fg=typer.colors.YELLOW)} {safe(message)}", err=True)


def read_config(file: Path) -> Config:
    """Load and check a configuration file. An invalid configuration ends the command with exit code 2."""
    try:
        return load(file)
    except ConfigError as error:
        fail(str(error), USAGE)


def read_leniently(file: Path, lenient: Callable[[Path], PartialConfig]) -> PartialConfig:
    """Load a configuration file with `lenient`, which leaves out invalid models. Any other error in the file ends the
    process with exit code 2."""
    try:
        return lenient(file)
    except ConfigError as error:
        fail(str(error), USAGE)


def replace_file(file: Path, text: str) -> None:
    """Replace a file atomically: write a temporary file in the same folder, then rename the temporary file.

    The new file may be lost in a power cut. The functions of ledger/files.py also sync the file to disk.
    """
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "w") as target:
            target.write(text)
        Path(scratch).replace(file)
    except BaseException:  # also on KeyboardInterrupt: remove the temporary file
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise
