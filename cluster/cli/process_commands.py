"""The commands that run a process of the cluster, such as `headrace gateway` and `headrace pod ...`.

This module does not import modules that only other commands need, so that processes start fast. The pod commands are
imported only for `headrace pod`.
"""

from __future__ import annotations

import typer

from cluster.cli.commands.run import processes

POD = "pod"
PROCESSES = (processes.gateway, processes.controller, processes.prepare)


def add_processes(app: typer.Typer) -> None:
    """Add a hidden command for each process that `up` starts, and the group `pod` with the processes of a pod."""
    for process in PROCESSES:
        app.command(hidden=True)(process)
    add_pods(app)


def add_pods(app: typer.Typer) -> None:
    """Add the commands that run the processes of a pod, one command for each container."""
    from cluster.cli.commands.run import pod

    app.add_typer(pod.app, name=POD)


def app_of(name: str) -> typer.Typer:
    """Return the typer app that has the command `name`. There are two apps: one has only the group `pod`, with the
    commands for the containers of a pod; the other has the commands of the processes that `up` starts."""
    app = typer.Typer(name="headrace", add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    if name == POD:
        add_pods(app)
    else:
        for process in PROCESSES:
            app.command()(process)
    return app
