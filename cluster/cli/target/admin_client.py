"""Client of a gateway's admin API for the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any
from urllib.parse import quote

import grpc
from google.protobuf.json_format import MessageToDict

from cluster.admin.v1 import admin_pb2, admin_pb2_grpc
from cluster.cli.common import rpc_errors
from cluster.cli.shared_options import Command, with_options
from cluster.cli.target.access import Access, admin_access
from cluster.cli.target.target_options import ADMIN_OPTIONS, target_of

TIMEOUT_S = 10.0
PAGE_SIZE = 500


class Admin:
    """Client of a gateway's admin services Fleet and Catalog. The client reads all pages of a list.

    `where` names the gateway in questions to the user.
    """

    def __init__(self, access: Access) -> None:
        self.where = f"{access.context} ({access.address})" if access.context else access.address
        self._console = access.console
        self._metadata = access.metadata
        self._channel = access.channel()
        self._fleet = admin_pb2_grpc.FleetStub(self._channel)
        self._catalog = admin_pb2_grpc.CatalogStub(self._channel)

    def close(self) -> None:
        """Close the connection to the gateway."""
        self._channel.close()

    def console_link(self, page: str, item: str = "") -> str:
        """Return the URL of a page of the console, or of an item on that page; "" if the console is not known."""
        if not self._console:
            return ""
        return f"{self._console}/#/{page}" + (f"/{quote(item, safe='')}" if item else "")

    def workers(self) -> list[admin_pb2.Worker]:
        """Return the workers that are linked to this gateway. Raises grpc.RpcError."""
        pages = self._pages(self._fleet.ListWorkers, admin_pb2.ListWorkersRequest(page_size=PAGE_SIZE))
        return [worker for page in pages for worker in page.workers]

    def _pages(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """Call a list method for all pages, and yield the pages."""
        while True:
            page = method(request, timeout=TIMEOUT_S, metadata=self._metadata)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def fleet(self, verb: str, request: Any) -> Any:
        """Call a method of the Fleet service. Raises grpc.RpcError."""
        return self.ask("fleet", verb, request)

    def ask(self, service: str, verb: str, request: Any, timeout_s: float = TIMEOUT_S) -> Any:
        """Call a method of the service `fleet` or `catalog`. Raises grpc.RpcError."""
        stub = {"fleet": self._fleet, "catalog": self._catalog}[service]
        return getattr(stub, verb)(request, timeout=timeout_s, metadata=self._metadata)

    def catalog(self) -> tuple[list[admin_pb2.CatalogEntry], float]:
        """Return the models, and the seconds since the gateway's last message from the controller.

        The seconds are negative before the first message. Raises grpc.RpcError.
        """
        pages = list(self._pages(self._catalog.List, admin_pb2.ListRequest(page_size=PAGE_SIZE)))
        return [model for page in pages for model in page.models], pages[-1].age_s

    def overview(self, *, with_calls: bool = True) -> dict[str, Any]:
        """Return the state of the whole cluster as one document; docs/console.md names its fields.

        Raises grpc.RpcError, and ValueError if the answer is not a JSON object.
        """
        request = admin_pb2.GetOverviewRequest(with_calls=with_calls)
        document = json.loads(self.fleet("GetOverview", request).document)
        if not isinstance(document, dict):
            raise ValueError("the overview is not a JSON object")
        return document

    def problems(self) -> list[dict[str, Any]] | None:
        """Return the present problems, the worst first; None if the gateway's release does not list them.

        Raises grpc.RpcError.
        """
        try:
            return self.overview(with_calls=False).get("problems")
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise

    def abort(self, request_id: str, tenant: str, reason: str) -> int:
        """Abort all calls with a request id on this gateway. Returns the number of aborted calls.

        Raises grpc.RpcError.
        """
        parent = f"tenants/{tenant}" if tenant else ""
        request = admin_pb2.AbortRequestRequest(request_id=request_id, parent=parent, reason=reason)
        return int(self._fleet.AbortRequest(request, timeout=TIMEOUT_S, metadata=self._metadata).aborted)


@contextmanager
def open_admin(access: Access) -> Iterator[Admin]:
    """Open a client of a gateway's admin API. A failed call ends the command with the exit code for the error."""
    with closing(Admin(access)) as admin, rpc_errors(access.address, access.context):
        yield admin


def with_admin(command: Command) -> Command:
    """Decorate a command: add the options that select a gateway, and pass a client as the argument `api`."""
    return with_options("api", ADMIN_OPTIONS, lambda ctx, _: open_admin(admin_access(target_of(ctx))))(command)


def plain(message: Any) -> dict[str, Any]:
    """Convert a message to a dictionary with all fields, including unset fields. 64-bit integers become numbers."""
    row: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for field in message.DESCRIPTOR.fields:
        if field.cpp_type == field.CPPTYPE_INT64 and not field.is_repeated:
            row[field.name] = int(row[field.name])
    return row
