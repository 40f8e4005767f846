"""The command line of the processes alone, which main.py runs for `headrace gateway`, `headrace pod ...` and so on.

Nothing that only other commands need is imported; the pod commands are imported only for a pod.
"""

from __future__ import annotations

import typer

from cluster.cli.commands import processes

POD = "pod"
PROCESSES = (processes.gateway, processes.controller, processes.prepare)


def add_processes(app: typer.Typer) -> None:
    """Add the processes as commands; those that only `up` starts are hidden."""
    for process in PROCESSES:
        app.command(hidden=True)(process)
    add_pods(app)


def add_pods(app: typer.Typer) -> None:
    """Add the processes of a pod, one command per container."""
    from cluster.cli.commands import pod

    app.add_typer(pod.app, name=POD)


def app_of(name: str) -> typer.Typer:
    """Build the command line that contains this process."""
    app = typer.Typer(name="headrace", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    if name == POD:
        add_pods(app)
    else:
        for process in PROCESSES:
            app.command()(process)
    return app
