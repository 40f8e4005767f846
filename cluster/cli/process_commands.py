"""The command line for processes only. `headrace gateway`, `headrace pod ...` and so on use this command line.

This module imports nothing that only other commands need. The pod commands are imported only in a pod.
"""

from __future__ import annotations

import typer

from cluster.cli.commands import processes

POD = "pod"
PROCESSES = (processes.gateway, processes.controller, processes.prepare)


def add_processes(app: typer.Typer) -> None:
    """Add the processes as commands. The processes that only `up` starts are hidden commands."""
    for process in PROCESSES:
        app.command(hidden=True)(process)
    add_pods(app)


def add_pods(app: typer.Typer) -> None:
    """Add the processes of a pod, one command per container."""
    from cluster.cli.commands import pod

    app.add_typer(pod.app, name=POD)


def app_of(name: str) -> typer.Typer:
    """Build the command line that contains the process with the given name."""
    app = typer.Typer(name="headrace", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    if name == POD:
        add_pods(app)
    else:
        for process in PROCESSES:
            app.command()(process)
    return app
