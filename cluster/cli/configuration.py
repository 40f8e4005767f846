"""Commands about the configuration: config check, config schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import JsonOption, out, print_json, read_config
from cluster.config import Config

app = typer.Typer(no_args_is_help=True, help="Check a cluster.yaml, or print what it may hold.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="The cluster.yaml.", show_default=False)], as_json: JsonOption = False
) -> None:
    """Say whether a file is right; exit code 2 names each wrong key by its path."""
    config = read_config(file)
    if as_json:
        print_json(config.model_dump(mode="json"))
        return
    models = ", ".join(model.name for model in config.models) or "no models"
    out.print(f"{file}: right; cluster {config.name}, {models}", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of cluster.yaml, for editors."""
    print_json(Config.model_json_schema())
