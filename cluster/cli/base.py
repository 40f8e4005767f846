"""What a process of the cluster shares with the commands: its files, exit codes, and how an error becomes one line."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cluster.cli.terminal import safe
from cluster.config.lenient import Lenient
from cluster.config.schema import Config, ConfigError, load

OK, FAILED, USAGE, UNREACHABLE_CODE = 0, 1, 2, 3
FileOption = Annotated[
    Path, typer.Option("-f", "--file", envvar="HEADRACE_CONFIG", help="The cluster.yaml.", show_default=False)
]


def fail(message: str, code: int = FAILED) -> NoReturn:
    """Say what is wrong on standard error and end with an exit code."""
    typer.echo(f"{typer.style('error:', fg=typer.colors.RED)} {safe(message)}", err=True)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Say on standard error what is likely a mistake."""
    typer.echo(f"{typer.style('warning:', fg=typer.colors.YELLOW)} {safe(message)}", err=True)


def read_config(file: Path) -> Config:
    """The checked configuration; a wrong one ends the command with exit code 2."""
    try:
        return load(file)
    except ConfigError as error:
        fail(str(error), USAGE)


def read_leniently(file: Path, lenient: Callable[[Path], Lenient]) -> Lenient:
    """What a process starts with although some models are wrong; anything else that is ends it with exit code 2."""
    try:
        return lenient(file)
    except ConfigError as error:
        fail(str(error), USAGE)


def write_whole(file: Path, text: str) -> None:
    """Write beside the file and rename over it. What must outlive a power cut goes by ledger/files.py, which waits for
    the disk."""
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
    try:
        with os.fdopen(handle, "w") as target:
            target.write(text)
        Path(scratch).replace(file)
    except BaseException:  # whatever interrupts, no draft stays beside the file
        with contextlib.suppress(OSError):
            Path(scratch).unlink()
        raise
