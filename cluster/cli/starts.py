"""The command line of the processes alone: what main.py runs for `headrace gateway`, `headrace pod ...` and such.

It imports nothing that only the other commands need.
"""

from __future__ import annotations

import typer

from cluster.cli import pod_secrets, pods, processes

POD = "pod"
PROCESSES = (processes.gateway, processes.controller, processes.prepare)


def add_processes(app: typer.Typer) -> None:
    """The processes as commands, those that only `up` starts unseen."""
    for process in PROCESSES:
        app.command(hidden=True)(process)
    app.add_typer(pods.app, name=POD)


pods.app.command("secrets")(pod_secrets.pod_secrets)
app = typer.Typer(name="headrace", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
add_processes(app)
