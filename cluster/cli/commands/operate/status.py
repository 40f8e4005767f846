"""The commands `status`, `workers` and `abort` for operators. The commands use the gateway's admin API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import grpc
import typer
from rich.markup import escape
from rich.table import Table

from cluster.api.types import weakest_resume_capability
from cluster.cli.common import JsonOption, fail, local_run, out, print_json
from cluster.cli.local import gateway_metrics
from cluster.cli.target.access import admin_access
from cluster.cli.target.admin_client import open_admin, plain
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_admin_target, with_target
from cluster.client.errors import from_rpc
from cluster.policy.problems import Hurts

HURTS_CALLERS = 4
"""Exit code of `status` while a problem hurts callers."""


def gather(target: ClusterTarget) -> dict[str, Any]:
    """Return the data that `status --json` prints. An unreachable gateway ends the command."""
    access = admin_access(target)
    address = access.address
    with open_admin(access) as admin:
        entries, age_s = admin.catalog()
        workers = admin.workers()
        problems = admin.problems()
    run = local_run()
    is_local = run is not None and run.endpoints().get("admin") == address
    endpoints = (
        run.endpoints()
        if run is not None and is_local
        else {"admin": address, **({"grpc": target.endpoint} if target.endpoint else {})}
    )
    models = [plain(entry) for entry in entries]
    siblings = run.siblings() if run is not None and is_local else []
    gateways = gateway_metrics.gateway_rows([endpoints, *siblings]) if siblings else []
    for model in models:  # the catalog counts only the calls that wait in the first process
        model["waiting"] += sum(gateway["waiting_by_model"].get(model["name"], 0) for gateway in gateways[1:])
    return {
        "name": run.name if run is not None and is_local else "",
        "context": target.context,
        "endpoints": endpoints,
        "gateways": gateways,
        "problems": problems,
        "catalog_age_s": age_s,
        "models": models,
        "workers": [plain(worker) for worker in workers],
    }


@with_admin_target
def status(target: ClusterTarget, as_json: JsonOption = False) -> None:
    """Show problems, endpoints, models and workers. The exit code is 4 while a problem hurts callers."""
    state = gather(target)
    if as_json:
        print_json(state)
    else:
        _print(state, target)
    if any(problem["hurts"] == Hurts.CALLERS for problem in state["problems"] or ()):
        raise typer.Exit(HURTS_CALLERS)


def _print(state: dict[str, Any], target: ClusterTarget) -> None:
    head = f"cluster {state['name']}   " if state["name"] else ""
    head = f"context {target.context}   " if target.context else head
    places = "   ".join(f"{name} {address}" for name, address in state["endpoints"].items())
    out.print(head + places, markup=False)
    for problem in state["problems"] or ():
        color = "bold red" if problem["hurts"] == Hurts.CALLERS else "yellow"
        since = time.strftime("%H:%M:%S", time.localtime(problem["since_s"]))
        cause = f": {problem['cause']}" if problem["cause"] else ""
        out.print(f"[{color}]{escape(problem['summary'])}[/{color}] since {since}{escape(cause)}")
        out.print(f"  {escape(problem['remedy'])} (runbook {problem['runbook']})")
    if not state["problems"]:
        out.print("no problem is known" if state["problems"] is not None else "the gateway's release lists no problems")
    if state["gateways"]:
        out.print(_gateway_table(state["gateways"]))
    out.print(_model_table(state["models"]))
    out.print(worker_table(state["workers"]))


@with_admin_target
def workers(target: ClusterTarget, as_json: JsonOption = False) -> None:
    """List the workers linked to a gateway, with node and pod."""
    rows = gather(target)["workers"]
    if as_json:
        print_json(rows)
    else:
        out.print(worker_table(rows))


@with_target
def abort(
    target: ClusterTarget,
    request_id: Annotated[str, typer.Argument(help="The call's x-request-id, or its answer's id.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)],
    tenant: Annotated[
        str, typer.Option("--tenant", help="Only this tenant's calls; request ids are chosen by callers.")
    ] = "",
    admin: Annotated[
        list[str] | None, typer.Option("--admin", help="A gateway's admin address; repeatable: all are asked.")
    ] = None,
) -> None:
    """Abort a running or waiting call. A gateway knows only the calls on its own host: name each gateway that may have
    the call."""
    aborted, missing = 0, ""
    addresses = admin or (target.admin or "").split(",")
    for address in addresses:
        access = admin_access(replace(target, admin=address))
        with open_admin(access) as api:
            try:
                aborted += api.abort(request_id, tenant, reason)
            except grpc.RpcError as error:
                refusal = from_rpc(error, endpoint=access.address)
                if refusal.reason != "NOT_FOUND":
                    raise
                missing = refusal.message
    if not aborted:
        fail(missing)
    out.print(f"aborted {aborted} {'call' if aborted == 1 else 'calls'}", markup=False)


def _gateway_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("gateway", "state", "workers", "running", "waiting", "link", "metrics", box=None, pad_edge=False)
    for row in rows:
        load = [str(row[name]) for name in ("workers", "running", "waiting")]
        cells = (str(row["process"]), "UP" if row["up"] else "DOWN", *load, row["link"], row["metrics"])
        table.add_row(*map(escape, cells))
    return table


def _model_table(rows: list[dict[str, Any]]) -> Table | str:
    if not rows:
        return "no models"
    with_defaults = any(row["default_sampling"] for row in rows)
    more = ("sampling", "note") if with_defaults else ("note",)
    table = Table("model", "aliases", "state", "replicas", "waiting", *more, box=None, pad_edge=False)
    for row in rows:
        note = row["state_reason"] or row["note"]
        replicas = f"{row['ready_workers']} of {row['replicas_desired']}"
        defaults = (sampling_text(row["default_sampling"]),) if with_defaults else ()
        cells = (row["name"], ", ".join(row["aliases"]), row["state"], replicas, str(row["waiting"]), *defaults, note)
        table.add_row(*map(escape, cells))
    return table


def sampling_text(defaults: Mapping[str, float]) -> str:
    """Return a short text of a model's sampling defaults."""
    return ", ".join(f"{name} {value:g}" for name, value in sorted(defaults.items()))


def worker_table(rows: list[dict[str, Any]]) -> Table | str:
    """Return a table of workers, with the load of each worker."""
    if not rows:
        return "no workers are linked"
    in_pods = any(row.get("pod", "") for row in rows)
    with_gpus = any(row.get("gpu", "") for row in rows)
    places = ("node", *(("pod",) if in_pods else ()), *(("GPU",) if with_gpus else ()))
    load_names = ("running", "waiting", "KV used", "step")
    table = Table("worker", "model", "state", *load_names, *places, "resume", "path", box=None, pad_edge=False)
    for row in rows:
        path = row["engine_path"] + (f" ({row['engine_path_reason']})" if row["engine_path_reason"] else "")
        running = f"{row['running']} of {row['max_num_seqs']}"
        load = (running, str(row["waiting"]), f"{row['kv_usage']:.0%}", f"{row['step_ms']:.1f} ms")
        node = row.get("host") or row.get("node", "")[:12]
        place = (
            node,
            *((row.get("pod", ""),) if in_pods else ()),
            *((row.get("gpu", ""),) if with_gpus else ()),
        )
        resume = weakest_resume_capability(row.get("capabilities", ())).removeprefix("resume:")
        table.add_row(*map(escape, (row["worker_id"], row["model"], row["state"], *load, *place, resume, path)))
    return table
