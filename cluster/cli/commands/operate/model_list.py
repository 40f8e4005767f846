"""Commands `models` and `models list`: the models that a caller may use. Operators also see the replicas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.table import Table

from cluster.cli.common import (
    USAGE,
    AdminOption,
    ApiKeyOption,
    EndpointOption,
    JsonOption,
    TlsCaOption,
    err,
    fail,
    local_run,
    make_client,
    out,
    print_json,
    target_errors,
)
from cluster.cli.target.access import admin_access
from cluster.cli.target.admin_client import Admin
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import (
    ADMIN_OPTIONS,
    ContextOption,
    root_of,
    target_of,
    typed_names,
    with_admin_target,
)
from cluster.client.errors import from_rpc
from cluster.v1 import inference_pb2 as pb


def models(
    ctx: typer.Context,
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
    context_name: ContextOption = None,
) -> None:
    """List the models that you may use; the commands below work on a single one."""
    if ctx.invoked_subcommand is None:
        show_models(target_of(ctx), as_json)
    elif typed := sorted(typed_names(ctx, (*ADMIN_OPTIONS, "as_json")) - typed_names(root_of(ctx), ())):
        option = {"as_json": "--json", "context_name": "--context"}.get(typed[0], f"--{typed[0].replace('_', '-')}")
        fail(f"{option} belongs behind `{ctx.invoked_subcommand}`", USAGE)


@with_admin_target
def list_models(target: ClusterTarget, as_json: JsonOption = False) -> None:
    """List the models that you may use. Replicas and nodes are shown for the local cluster, with --admin, and with a
    context that has an admin address."""
    show_models(target, as_json)


def show_models(target: ClusterTarget, as_json: bool) -> None:
    """Print the models that the caller may use, with their replicas and nodes if the admin address is known."""
    with make_client(target, 30.0) as client, target_errors(target):
        available = client.models()
    replicas = _replicas(target)
    rows = [model_row(model) | replicas.get(model.name, {}) for model in available]
    if as_json:
        print_json(rows)
        return
    places = ("replicas", "nodes") if replicas else ()
    table = Table("model", "aliases", "state", *places, "context", "license", box=None, pad_edge=False)
    for model, row in zip(available, rows, strict=True):
        state = row["state"] + (f" ({model.state_reason})" if model.state_reason else "")
        shown = (f"{row['ready_workers']} of {row['replicas_desired']}", _nodes(row)) if "nodes" in row else ("", "")
        size = str(model.max_model_len or "")
        cells = (model.name, ", ".join(model.aliases), state, *(shown if places else ()), size, model.license)
        table.add_row(*map(escape, cells))
    out.print(table)


def _nodes(row: Mapping[str, Any]) -> str:
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in row["nodes"].items())


def _replicas(target: ClusterTarget) -> dict[str, dict[str, Any]]:
    """Return the replicas and nodes of each model from the admin API.

    The result is empty if no admin address is known. If the admin API refuses or does not answer, the result is empty
    too, and a note is printed. This does not end the command, because the caller may not be an operator.
    """
    if target.admin is None and (target.is_named or local_run() is None):
        return {}
    access = admin_access(target)
    with closing(Admin(access)) as api:
        try:
            entries, _ = api.catalog()
            workers = api.workers()
        except grpc.RpcError as error:
            refusal = from_rpc(error, endpoint=access.address)
            err.print(f"[yellow]note:[/yellow] replicas are not shown: {escape(refusal.message)}")
            return {}
    nodes = nodes_by_model((worker.model, worker.host or worker.node[:12]) for worker in workers)
    return {
        entry.name: {
            "ready_workers": entry.ready_workers,
            "replicas_desired": entry.replicas_desired,
            "nodes": nodes.get(entry.name, {}),
        }
        for entry in entries
    }


def nodes_by_model(places: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Return the number of workers on each node, for each model. `places`: the model and the node of each worker."""
    counts: dict[str, Counter[str]] = {}
    for model, node in places:
        counts.setdefault(model, Counter())[node] += 1
    return {model: dict(sorted(nodes.items())) for model, nodes in counts.items()}


def model_row(model: pb.Model) -> dict[str, Any]:
    """Return a model in the form that --json prints. The state has no prefix `STATE_`."""
    row: dict[str, Any] = MessageToDict(model, preserving_proto_field_name=True)
    return row | {
        "name": model.name,
        "aliases": list(model.aliases),
        "state": pb.Model.State.Name(model.state).removeprefix("STATE_"),
    }
