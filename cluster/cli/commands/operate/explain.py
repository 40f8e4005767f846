"""Command `explain request`, which shows which workers got a call and why, and the predicted and the actual number of
cached prompt tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

import grpc
import typer
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import routing_pb2 as pb
from cluster.cli.common import JsonOption, fail, out, print_json, rpc_errors, warn
from cluster.cli.target.access import Access, admin_access
from cluster.cli.target.admin_client import open_admin, plain
from cluster.cli.target.contexts import ClusterTarget
from cluster.cli.target.target_options import with_target
from cluster.client.errors import from_rpc


@with_target
def explain_request(
    target: ClusterTarget,
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="The call's x-request-id, or its answer's id.", show_default=False)
    ],
    tenant: Annotated[
        str, typer.Option("--tenant", help="Only this tenant's calls; request ids are chosen by callers.")
    ] = "",
    as_json: JsonOption = False,
    admin: Annotated[
        list[str] | None, typer.Option("--admin", help="A gateway's admin address; repeatable: all are asked.")
    ] = None,
) -> None:
    """Explain where a call went, and why. Shows the workers that were compared, with their scores, and the predicted
    and the real cached tokens. A gateway remembers its newest calls, also ended ones: name each gateway that may have
    the call."""
    request = pb.ExplainRequestRequest(request_id=request_id, parent=f"tenants/{tenant}" if tenant else "")
    calls: list[pb.ExplainedCall] = []
    links: dict[str, str] = {}
    missing = ""
    failed: list[tuple[Access, grpc.RpcError]] = []
    addresses = admin or (target.admin or "").split(",")
    for address in addresses:
        access = admin_access(replace(target, admin=address))
        with open_admin(access) as api:
            try:
                found = api.fleet("ExplainRequest", request).calls
                calls += found
                links |= {call.id: api.console_link("calls", call.id) for call in found}
            except grpc.RpcError as error:
                refusal = from_rpc(error, endpoint=access.address)
                if refusal.reason == "NOT_FOUND":
                    missing = refusal.message
                else:
                    failed.append((access, error))
    if not calls and failed:
        access, first = failed[0]
        with rpc_errors(access.address, access.context):
            raise first
    if not calls:
        fail(missing)
    for access, failure in failed:
        warn(f"{access.address} gave no answer: {from_rpc(failure, endpoint=access.address).message}")
    calls.sort(key=lambda call: call.arrived_at_s)
    if as_json:
        print_json([plain(call) for call in calls])
        return
    for call in calls:
        _show(call)
        if links[call.id]:
            out.print(f"in the console: {links[call.id]}", markup=False)


def _show(call: pb.ExplainedCall) -> None:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(call.arrived_at_s))
    request_id = f" (x-request-id {call.request_id})" if call.request_id != call.id else ""
    gateway = f"   gateway {call.gateway}" if call.gateway else ""
    out.print(f"call {call.id}{request_id}   tenant {call.tenant}   model {call.model}{gateway}", markup=False)
    state = f"ended with {call.outcome} after" if call.outcome else "runs since"
    out.print(f"arrived {at}, {state} {_duration(call.duration_s)}", markup=False)
    if call.omitted_routes:
        out.print(f"{call.omitted_routes} earlier decisions are no longer remembered", markup=False)
    for route in call.routes:
        out.print()
        out.print(f"output {route.sequence}, {_duration(route.after_s)} after the arrival: {route.why}", markup=False)
        if route.node:
            place = f"in pod {route.pod} on node {route.node}" if route.pod else f"on node {route.node}"
            out.print(f"{route.worker} runs {place}", markup=False)
        out.print(_result(route), markup=False)
        if route.candidates:
            out.print(_table(route))
            if (more := route.compared - len(route.candidates)) > 0:
                out.print(f"and {more} more workers", markup=False)


def _result(route: pb.ExplainedRoute) -> str:
    """Return one line with the predicted and the actual number of cached tokens."""
    if route.prediction:
        predicted = f"predicted {route.predicted_cached_tokens} cached tokens ({route.prediction})"
    else:
        predicted = "no prediction of cached tokens"
    if not route.HasField("cached_tokens"):
        return f"{predicted}; no output yet from this worker"
    found = f"the engine found {route.cached_tokens} of {route.tokens}"
    return f"{predicted}; {found}; first output after {_duration(route.first_output_s)}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _table(route: pb.ExplainedRoute) -> Table:
    names = list(dict.fromkeys(part.name for each in route.candidates for part in each.parts))
    table = Table("worker", "cached", "total", *map(escape, names), "dropped", box=None, pad_edge=False)
    for each in route.candidates:
        values = {part.name: part.value for part in each.parts}
        cached = str(each.cached_tokens) if each.HasField("cached_tokens") else "-"
        chosen = " *" if each.worker == route.worker else ""
        scores = _numbers([each.total, *(values.get(name) for name in names)] if values else [None] * (len(names) + 1))
        table.add_row(*map(escape, (each.worker + chosen, cached, *scores, each.dropped)))
    return table


def _numbers(values: Iterable[Any]) -> list[str]:
    return ["" if value is None else f"{value:.3f}" for value in values]
