"""Commands about the configuration: config check, config schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import terminal
from cluster.cli.common import USAGE as USAGE
from cluster.cli.common import JsonOption, fail, print_json, warn

app = typer.Typer(no_args_is_help=True, help="Check a cluster.yaml, or print its JSON schema.")


@app.command()
def check(
    file: Annotated[
        str,
        typer.Argument(
            help="A cluster.yaml, values of the chart, or a ConfigMap with a cluster.yaml; - reads standard input.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
    pod: Annotated[
        bool, typer.Option("--pod", help="Apply the rules for Kubernetes pods; always on for values and ConfigMaps.")
    ] = False,
    files: Annotated[bool, typer.Option("--files", help="Require files that it names to be on this machine.")] = False,
) -> None:
    """Check that every process of the cluster would accept a file. Exit code 2 with one line for each error; exit
    code 0 otherwise, with warnings of likely mistakes."""
    from cluster.cli.config_check import ConfigFinding, Report
    from cluster.cli.config_check import check as check_text

    name = "standard input" if file == "-" else file
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        report = check_text(data.decode(), name, pod=pod, files=files)
    except OSError as error:
        report = Report(name, errors=(ConfigFinding("", f"cannot be read: {error.strerror}"),))
    except UnicodeDecodeError as error:
        report = Report(name, errors=(ConfigFinding("", f"is not UTF-8: {error.reason} at byte {error.start}"),))
    if as_json:
        print_json(report.as_json())
        raise typer.Exit(USAGE if report.errors else 0)
    for finding in report.warnings:
        warn(f"{name}: {finding}")
    if report.errors:
        fail("\n".join(f"{name}: {finding}" for finding in report.errors), USAGE)
    assert report.config is not None
    models = ", ".join(model.name for model in report.config.models) or "no models"
    terminal.say(f"{name}: valid; cluster {report.config.name}, {models}")


@app.command()
def schema() -> None:
    """Print the JSON schema of cluster.yaml, for use in editors."""
    from cluster.config.descriptions import config_schema

    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:headrace:config:v1"}
    print_json({**head, "title": "cluster.yaml of Headrace", **config_schema()})
