"""drain, cordon and uncordon: whether workers take new work, by the gateway's admin API."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from cluster.admin.v1 import admin_pb2 as pb
from cluster.cli.access import Access, reach
from cluster.cli.commands.status import Admin, plain, worker_table
from cluster.cli.common import (
    FAILED,
    AdminOption,
    ApiKeyOption,
    EndpointOption,
    JsonOption,
    TlsCaOption,
    err,
    out,
    print_json,
    rpc_errors,
)

POLL_S = 0.2
LAG_S = 2.0
"""Beyond the workers' own time: until a gateway has heard how they stand."""

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKER|POD|NODE", help="A worker's id, or a pod or node by Kubernetes' name, or a node's id in Ray."
    ),
]
DrainTimeoutOption = Annotated[
    float, typer.Option("--timeout-s", help="Within this time what runs ends or moves.", min=0.001, max=604_800.0)
]


def drain(
    target: TargetArgument,
    timeout_s: DrainTimeoutOption = 300.0,
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Let workers take no new work, and wait until what runs has ended or moved. Nothing is cut: what still runs
    after the time goes on, and the command ends with 1. `uncordon` takes it back."""
    access = reach(endpoint, admin, api_key_file, tls_ca)
    api = Admin(access)
    try:
        with rpc_errors(access.address):
            answer = api.fleet("Drain", pb.DrainRequest(target=target, timeout_s=timeout_s))
            told = {worker.worker_id for worker in answer.workers}
            _say(answer.notes)
            rows = _wait(api, told, time.monotonic() + timeout_s + LAG_S)
    finally:
        api.close()
    _show(rows, as_json, told)
    if any(row.state != "DRAINED" for row in rows):
        raise typer.Exit(FAILED)


def cordon(
    target: TargetArgument,
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Let workers take no new work; what runs there stays."""
    _tell("Cordon", pb.CordonRequest(target=target), "CORDONED", as_json, reach(endpoint, admin, api_key_file, tls_ca))


def uncordon(
    target: TargetArgument,
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Let workers take work again, after cordon or drain."""
    _tell("Uncordon", pb.UncordonRequest(target=target), "READY", as_json, reach(endpoint, admin, api_key_file, tls_ca))


def _tell(verb: str, request: Any, state: str, as_json: bool, access: Access) -> None:
    """Ask, and wait until the workers say that they have done so."""
    api = Admin(access)
    try:
        with rpc_errors(access.address):
            answer = api.fleet(verb, request)
            told = {worker.worker_id for worker in answer.workers}
            _say(getattr(answer, "notes", ()))
            rows = _wait(api, told, time.monotonic() + LAG_S, state)
    finally:
        api.close()
    _show(rows, as_json, told)


def _wait(api: Admin, told: Collection[str], until: float, state: str = "DRAINED") -> list[pb.Worker]:
    """Until all stand so, or the time is over; how they stand then. One that has left is not among them."""
    while True:
        rows = [worker for worker in api.workers() if worker.worker_id in told]
        if all(worker.state == state for worker in rows) or time.monotonic() > until:
            return rows
        time.sleep(POLL_S)


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        err.print(f"[yellow]note:[/yellow] {escape(note)}")


def _show(rows: Sequence[pb.Worker], as_json: bool, told: Collection[str]) -> None:
    if as_json:
        print_json([plain(row) for row in rows])
        return
    if rows:
        out.print(worker_table([plain(row) for row in rows]))
    for gone in sorted(set(told) - {row.worker_id for row in rows}):
        out.print(f"{gone} has left", markup=False)
