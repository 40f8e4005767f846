"""Commands status, workers and abort for operators. The commands use the gateway's admin API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import admin_pb2, admin_pb2_grpc
from cluster.api.types import weakest_resume_capability
from cluster.cli.access import Access, admin_access
from cluster.cli.common import (
    AdminOption,
    ApiKeyOption,
    EndpointOption,
    JsonOption,
    TlsCaOption,
    fail,
    local_run,
    out,
    print_json,
    rpc_errors,
)
from cluster.cli.local import gateway_metrics
from cluster.client.errors import from_rpc

TIMEOUT_S = 10.0
PAGE_SIZE = 500


class Admin:
    """Client of a gateway's admin services Fleet and Catalog. The client reads all pages of a list."""

    def __init__(self, access: Access) -> None:
        self._metadata = access.metadata
        self._channel = access.channel()
        self._fleet = admin_pb2_grpc.FleetStub(self._channel)
        self._catalog = admin_pb2_grpc.CatalogStub(self._channel)

    def close(self) -> None:
        """Close the connection to the gateway."""
        self._channel.close()

    def workers(self) -> list[admin_pb2.Worker]:
        """Return the workers that are linked to this gateway. Raises grpc.RpcError."""
        workers: list[admin_pb2.Worker] = []
        page = ""
        while True:
            request = admin_pb2.ListWorkersRequest(page_size=PAGE_SIZE, page_token=page)
            answer = self._fleet.ListWorkers(request, timeout=TIMEOUT_S, metadata=self._metadata)
            workers.extend(answer.workers)
            page = answer.next_page_token
            if not page:
                return workers

    def fleet(self, verb: str, request: Any) -> Any:
        """Call a method of the Fleet service. Raises grpc.RpcError."""
        return self.ask("fleet", verb, request)

    def ask(self, service: str, verb: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Call a method of the service `fleet` or `catalog`. Raises grpc.RpcError."""
        stub = {"fleet": self._fleet, "catalog": self._catalog}[service]
        return getattr(stub, verb)(request, timeout=timeout_s, metadata=self._metadata)

    def catalog(self) -> tuple[list[admin_pb2.CatalogEntry], float]:
        """Return the models, and the number of seconds since the controller's last message. Raises grpc.RpcError.

        The number is negative if the controller has not sent a message yet.
        """
        models: list[admin_pb2.CatalogEntry] = []
        page = ""
        while True:
            request = admin_pb2.ListRequest(page_size=PAGE_SIZE, page_token=page)
            answer = self._catalog.List(request, timeout=TIMEOUT_S, metadata=self._metadata)
            models.extend(answer.models)
            page = answer.next_page_token
            if not page:
                return models, answer.age_s

    def abort(self, request_id: str, tenant: str, reason: str) -> int:
        """Abort all calls with a request id on this gateway. Returns the number of aborted calls.

        Raises grpc.RpcError.
        """
        parent = f"tenants/{tenant}" if tenant else ""
        request = admin_pb2.AbortRequestRequest(request_id=request_id, parent=parent, reason=reason)
        return int(self._fleet.AbortRequest(request, timeout=TIMEOUT_S, metadata=self._metadata).aborted)


def plain(message: Any) -> dict[str, Any]:
    """Convert a message to a dictionary with all fields, including unset fields. 64-bit integers become numbers."""
    row: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for field in message.DESCRIPTOR.fields:
        if field.cpp_type == field.CPPTYPE_INT64 and not field.is_repeated:
            row[field.name] = int(row[field.name])
    return row


def gather(
    endpoint: str | None, admin_address: str | None, api_key_file: Path | None = None, tls_ca: Path | None = None
) -> dict[str, Any]:
    """Return the data that `status --json` prints. An unreachable gateway ends the command."""
    access = admin_access(endpoint, admin_address, api_key_file, tls_ca)
    address, admin = access.address, Admin(access)
    try:
        with rpc_errors(address):
            entries, age_s = admin.catalog()
            workers = admin.workers()
    finally:
        admin.close()
    run = local_run()
    is_local = run is not None and run.endpoints().get("admin") == address
    endpoints = (
        run.endpoints()
        if run is not None and is_local
        else {"admin": address, **({"grpc": endpoint} if endpoint else {})}
    )
    models = [plain(entry) for entry in entries]
    siblings = run.siblings() if run is not None and is_local else []
    gateways = gateway_metrics.gateway_rows([endpoints, *siblings]) if siblings else []
    for model in models:  # the catalog counts only the calls that wait in the first process
        model["waiting"] += sum(gateway["waiting_by_model"].get(model["name"], 0) for gateway in gateways[1:])
    return {
        "name": run.name if run is not None and is_local else "",
        "endpoints": endpoints,
        "gateways": gateways,
        "catalog_age_s": age_s,
        "models": models,
        "workers": [plain(worker) for worker in workers],
    }


def status(
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Show the cluster's endpoints, models and workers."""
    state = gather(endpoint, admin, api_key_file, tls_ca)
    if as_json:
        print_json(state)
        return
    head = f"cluster {state['name']}   " if state["name"] else ""
    places = "   ".join(f"{name} {address}" for name, address in state["endpoints"].items())
    out.print(head + places, markup=False)
    age_s = state["catalog_age_s"]
    if age_s < 0:
        out.print("[yellow]no controller has connected to this gateway yet[/yellow]")
    elif age_s > 30:
        out.print(
            f"[yellow]the controller has been silent for {age_s:.0f} s: models are served, but not scaled[/yellow]"
        )
    if state["gateways"]:
        out.print(_gateway_table(state["gateways"]))
    out.print(_model_table(state["models"]))
    out.print(worker_table(state["workers"]))


def workers(
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """List the workers linked to the gateway."""
    rows = gather(endpoint, admin, api_key_file, tls_ca)["workers"]
    if as_json:
        print_json(rows)
    else:
        out.print(worker_table(rows))


def abort(
    request_id: Annotated[str, typer.Argument(help="The call's x-request-id, or its answer's id.", show_default=False)],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)],
    tenant: Annotated[
        str, typer.Option("--tenant", help="Only this tenant's calls; request ids are chosen by callers.")
    ] = "",
    endpoint: EndpointOption = None,
    admin: Annotated[
        list[str] | None, typer.Option("--admin", help="A gateway's admin address; repeatable: all are tried.")
    ] = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Abort a running call. A gateway knows only the calls on its own host: name each gateway that may have it."""
    aborted, missing = 0, ""
    for address in admin or [""]:
        access = admin_access(endpoint, address or None, api_key_file, tls_ca)
        api = Admin(access)
        try:
            with rpc_errors(access.address):
                try:
                    aborted += api.abort(request_id, tenant, reason)
                except grpc.RpcError as error:
                    refusal = from_rpc(error, endpoint=access.address)
                    if refusal.reason != "NOT_FOUND":
                        raise
                    missing = refusal.message
        finally:
            api.close()
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
    table = Table("model", "aliases", "state", "replicas", "waiting", "note", box=None, pad_edge=False)
    for row in rows:
        note = row["state_reason"] or row["note"]
        replicas = f"{row['ready_workers']} of {row['replicas_desired']}"
        cells = (row["name"], ", ".join(row["aliases"]), row["state"], replicas, str(row["waiting"]), note)
        table.add_row(*map(escape, cells))
    return table


def worker_table(rows: list[dict[str, Any]]) -> Table | str:
    """Return a table of workers, with the load of each worker."""
    if not rows:
        return "no workers are linked"
    in_pods = any(row.get("pod", "") for row in rows)
    places = ("node", "pod") if in_pods else ("node",)
    load_names = ("running", "waiting", "KV used", "step")
    table = Table("worker", "model", "state", *load_names, *places, "resume", "path", box=None, pad_edge=False)
    for row in rows:
        path = row["engine_path"] + (f" ({row['engine_path_reason']})" if row["engine_path_reason"] else "")
        running = f"{row['running']} of {row['max_num_seqs']}"
        load = (running, str(row["waiting"]), f"{row['kv_usage']:.0%}", f"{row['step_ms']:.1f} ms")
        node = row.get("host") or row.get("node", "")[:12]
        place = (node, row.get("pod", "")) if in_pods else (node,)
        resume = weakest_resume_capability(row.get("capabilities", ())).removeprefix("resume:")
        table.add_row(*map(escape, (row["worker_id"], row["model"], row["state"], *load, *place, resume, path)))
    return table
