"""The commands `drain`, `cordon` and `uncordon`, which use the admin API to stop or resume new work on workers."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from cluster.admin.v1 import admin_pb2 as pb
from cluster.cli.commands.operate.status import worker_table
from cluster.cli.common import FAILED, JsonOption, err, out, print_json
from cluster.cli.target.admin_client import Admin, plain, with_admin

POLL_S = 0.2
LAG_S = 2.0
"""Extra time to wait, in seconds, because a worker's new state reaches the gateway with a delay."""

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKER|POD|NODE", help="A worker's id, a pod's or node's name in Kubernetes, or a node's id in Ray."
    ),
]
DrainTimeoutOption = Annotated[
    float, typer.Option("--timeout-s", help="Seconds for running calls to end or move.", min=0.001, max=604_800.0)
]


@with_admin
def drain(
    api: Admin, target: TargetArgument, timeout_s: DrainTimeoutOption = 300.0, as_json: JsonOption = False
) -> None:
    """Send workers no new calls, wait for their running calls. These end there, or move to other workers. No call
    is cut off: calls that still run after the timeout continue, and the exit code is 1. Undo with `uncordon`."""
    answer = api.fleet("Drain", pb.DrainRequest(target=target, timeout_s=timeout_s))
    targets = {worker.worker_id for worker in answer.workers}
    _print_notes(answer.notes)
    rows = _wait_for_state(api, targets, time.monotonic() + timeout_s + LAG_S)
    _show(rows, as_json, targets)
    if any(row.state != "DRAINED" for row in rows):
        raise typer.Exit(FAILED)


@with_admin
def cordon(api: Admin, target: TargetArgument, as_json: JsonOption = False) -> None:
    """Send workers no new calls; running calls stay there. Undo with `uncordon`."""
    _request_and_wait(api, "Cordon", pb.CordonRequest(target=target), "CORDONED", as_json)


@with_admin
def uncordon(api: Admin, target: TargetArgument, as_json: JsonOption = False) -> None:
    """Send workers new calls again, after `cordon` or `drain`."""
    _request_and_wait(api, "Uncordon", pb.UncordonRequest(target=target), "READY", as_json)


def _request_and_wait(api: Admin, verb: str, request: Any, state: str, as_json: bool) -> None:
    """Send a request, and wait until the workers report the state `state`."""
    answer = api.fleet(verb, request)
    targets = {worker.worker_id for worker in answer.workers}
    _print_notes(getattr(answer, "notes", ()))
    rows = _wait_for_state(api, targets, time.monotonic() + LAG_S, state)
    _show(rows, as_json, targets)


def _wait_for_state(api: Admin, targets: Collection[str], until: float, state: str = "DRAINED") -> list[pb.Worker]:
    """Wait until all connected workers among `targets` have the state `state`. Returns these workers.

    At the time `until` of the monotonic clock, the wait ends even if some workers do not have the state.
    """
    while True:
        rows = [worker for worker in api.workers() if worker.worker_id in targets]
        if all(worker.state == state for worker in rows) or time.monotonic() > until:
            return rows
        time.sleep(POLL_S)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        err.print(f"[yellow]note:[/yellow] {escape(note)}")


def _show(rows: Sequence[pb.Worker], as_json: bool, targets: Collection[str]) -> None:
    if as_json:
        print_json([plain(row) for row in rows])
        return
    if rows:
        out.print(worker_table([plain(row) for row in rows]))
    for worker_id in sorted(set(targets) - {row.worker_id for row in rows}):
        out.print(f"{worker_id} has disconnected", markup=False)
