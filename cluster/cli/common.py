"""Helpers shared by the commands: options, the cluster's addresses, and errors as one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from rich.console import Console
from rich.text import Text

from cluster.cli.base import DIFFERS as DIFFERS
from cluster.cli.base import FAILED as FAILED
from cluster.cli.base import OK as OK
from cluster.cli.base import UNREACHABLE_CODE as UNREACHABLE_CODE
from cluster.cli.base import USAGE as USAGE
from cluster.cli.base import FileOption as FileOption
from cluster.cli.base import fail as fail
from cluster.cli.base import read_config as read_config
from cluster.cli.base import warn as warn
from cluster.cli.local.run_folder import RunFolder
from cluster.cli.target.contexts import CA_VARIABLE, ENDPOINT_VARIABLE, KEY_VARIABLE, ClusterTarget
from cluster.cli.terminal import safe, write_json
from cluster.client import UNREACHABLE, Client, HeadraceError
from cluster.client.errors import from_rpc
from cluster.client.options import DEFAULT_ENDPOINT
from cluster.config.gateway import is_loopback

ADMIN_PORT = 50053
_CODES = {"INVALID_FIELD": USAGE, "STORE_UNAVAILABLE": UNREACHABLE_CODE}


class SafeConsole(Console):
    """A rich console that escapes control characters in texts and table cells before it computes the layout."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape a text, then let rich style the escaped text."""
        return super().render_str(safe(text), **options)


# Rich cuts tables to the terminal's width. Without a terminal, Rich would assume a width of 80 columns.
out = SafeConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = SafeConsole(highlight=False, soft_wrap=True, stderr=True)

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        envvar=ENDPOINT_VARIABLE,
        help="The gateway's gRPC address, host:port.",
        show_default="of the context, the local cluster, or localhost:50051",
    ),
]
AdminOption = Annotated[
    str | None,
    typer.Option(
        "--admin",
        help="The gateway's admin address, host:port.",
        show_default="of the context, the local cluster, or port 50053 of that host",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ApiKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="A file with the API key.",
        show_default=f"of the context; else {KEY_VARIABLE} has the key",
        exists=True,
        dir_okay=False,
    ),
]
TlsCaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar=CA_VARIABLE,
        help="A file with the CA of the gateway's certificate (PEM); turns TLS on.",
        show_default="of the context",
        dir_okay=False,
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout-s", help="Deadline of the whole call, in seconds.", min=0.001)]


def print_json(value: Any) -> None:
    """Print a value as JSON to standard output."""
    write_json(value)


def local_run() -> RunFolder | None:
    """Return the run folder of the local cluster if exactly one local cluster is up, else None."""
    running = RunFolder.running()
    return running[0] if len(running) == 1 else None


def grpc_endpoint(given: str | None) -> str:
    """Return the gRPC endpoint for callers.

    Order of preference: the given endpoint, the endpoint of the only local cluster, the default endpoint.
    """
    if given:
        return given
    run = local_run()
    return (run.endpoints().get("grpc") if run else None) or DEFAULT_ENDPOINT


def admin_endpoint(endpoint: str | None, given: str | None) -> str:
    """Return the admin address for a command.

    Order of preference: the given address, the local cluster's address, port 50053 on the host of `endpoint`. Of
    several addresses, separated by commas, the first is used.
    """
    if given:
        return given.split(",")[0]
    first = endpoint.split(",")[0] if endpoint else None
    run = local_run()
    if run and (first is None or _is_same_address(first, run.endpoints().get("grpc", ""))):
        address = run.endpoints().get("admin")
        if address:
            return address
    host = (first or DEFAULT_ENDPOINT).rsplit(":", 1)[0]
    return f"{host}:{ADMIN_PORT}"


def _is_same_address(first: str, second: str) -> bool:
    """Return whether two host:port addresses are equal. All names of the loopback interface count as one host."""
    hosts = [address.rpartition(":")[0] for address in (first, second)]
    ports = [address.rpartition(":")[2] for address in (first, second)]
    return ports[0] == ports[1] and (hosts[0] == hosts[1] or all(is_loopback(address) for address in (first, second)))


def api_key(target: ClusterTarget) -> str:
    """Return the API key for a command's calls; "" for none.

    The key is read from the target's key file. If the target has no key file, the key is the value of the target's
    environment variable. An unreadable file, or an unset variable that a context names, ends the command with exit
    code 2.
    """
    if target.api_key_file is None:
        key = os.environ.get(target.api_key_env, "")
        if not key and target.api_key_env != KEY_VARIABLE:
            fail(f"context {target.context}: the variable {target.api_key_env} with its API key is not set", USAGE)
        return key
    try:
        return target.api_key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--api-key-file {target.api_key_file}: cannot be read: {error}", USAGE)


def make_client(target: ClusterTarget, timeout_s: float | None = None) -> Client:
    """Create an SDK client for a command's target."""
    is_local = not target.is_named and local_run() is not None
    tls_ca = None if is_local and target.tls_ca_is_general else target.tls_ca
    try:
        return Client(grpc_endpoint(target.endpoint), api_key=api_key(target), tls_ca_file=tls_ca, timeout_s=timeout_s)
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)


def _how_to_reach(context: str) -> str:
    """Return a hint for the error message that is shown when no gateway answers."""
    if context:
        return f"the address is of the context {context} (`headrace context show {context}`)"
    running = RunFolder.running()
    if len(running) > 1:
        names = ", ".join(run.name for run in running)
        return f"{len(running)} local clusters are up ({names}): choose one by --endpoint or --admin HOST:PORT"
    local = "no local cluster is up (`headrace up -f FILE`)"
    if running:
        addresses = running[0].endpoints()
        ports = ", ".join(f"{name} at {addresses[name]}" for name in ("grpc", "admin") if name in addresses)
        local = f"the local cluster {running[0].name} is up" + (f" ({ports})" if ports else "")
    return f"{local}; for a gateway elsewhere give --endpoint, --admin or --context"


@contextlib.contextmanager
def rpc_errors(endpoint: str, context: str = "") -> Iterator[None]:
    """Turn a failed RPC into a one-line error.

    The exit code is 3 if the gateway is unreachable or cannot reach its store, 2 for an invalid value, and 1 otherwise.
    `context`: name of the context that has the address, for the error message.
    """
    try:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc(error, endpoint=endpoint) from None
    except HeadraceError as error:
        if error.reason == UNREACHABLE:
            fail(f"{error.message}; {_how_to_reach(context)}", UNREACHABLE_CODE)
        if error.reason == "UNIMPLEMENTED":
            error.message += f"; {endpoint} may be the wrong port: callers use gateway.listen.grpc, operators .admin"
        pause = f" (try again in {error.retry_after_s:g} s)" if error.retry_after_s else ""
        fail(f"{error.reason}: {error.message}{pause}", _CODES.get(error.reason, FAILED))


def target_errors(target: ClusterTarget) -> contextlib.AbstractContextManager[None]:
    """Return a context that turns a failed RPC to the target's gRPC endpoint into a one-line error."""
    return rpc_errors(grpc_endpoint(target.endpoint), target.context)
