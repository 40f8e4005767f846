"""Commands `context add`, `use`, `list`, `show` and `remove`: named clusters with their addresses and credentials."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import USAGE, JsonOption, err, fail, out, print_json
from cluster.cli.ledger import show_table
from cluster.cli.target.contexts import (
    ENDPOINT_VARIABLE,
    LOCAL,
    ClusterContext,
    ContextError,
    Contexts,
    contexts_file,
    write_contexts,
)
from cluster.cli.target.target_options import complete_context, stored_contexts, target_of

app = typer.Typer(
    no_args_is_help=True,
    help="Name clusters, and choose the one that commands use.",
)
NameArgument = Annotated[
    str, typer.Argument(help="The context's name.", show_default=False, autocompletion=complete_context)
]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="A name for the cluster.", show_default=False)],
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="The gateways' gRPC address, host:port.", show_default=False)
    ],
    admin: Annotated[
        str, typer.Option("--admin", help="The admin address.", show_default="port 50053 of --endpoint's host")
    ] = "",
    tls_ca: Annotated[
        Path | None,
        typer.Option("--tls-ca", help="A file with the CA of the gateways' certificate.", exists=True, dir_okay=False),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", help="A file with the API key; only its path is stored.", exists=True),
    ] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="The variable with the API key; only its name is stored.")
    ] = "",
    console: Annotated[
        str, typer.Option("--console", help="The console's URL, for links of `explain`: https://llm.example.com.")
    ] = "",
    use: Annotated[bool, typer.Option("--use", help="Make it the current context.")] = False,
) -> None:
    """Add a context, or replace the context of this name."""
    try:
        context = ClusterContext(
            name,
            endpoint,
            admin,
            str(tls_ca.absolute()) if tls_ca else "",
            str(api_key_file.absolute()) if api_key_file else "",
            api_key_env,
            console.rstrip("/"),
        )
    except ContextError as error:
        fail(str(error), USAGE)
    contexts = stored_contexts().with_context(context)
    _write(contexts.using(name) if use else contexts)
    out.print(f"added {name}" + (", the current context" if use else ""), markup=False)


@app.command("use")
def use_context(name: NameArgument) -> None:
    """Make a context the current one. `local` stands for the local cluster."""
    try:
        _write(stored_contexts().using(name))
    except ContextError as error:
        fail(str(error), USAGE)
    out.print(f"the current context is {name}", markup=False)


@app.command("list")
def list_contexts(as_json: JsonOption = False) -> None:
    """List the contexts; the current one has a star."""
    contexts = stored_contexts()
    if as_json:
        print_json({"current": contexts.current or LOCAL, "contexts": [asdict(c) for c in contexts.by_name.values()]})
        return
    rows = [
        {
            "context": context.name + (" *" if context.name == contexts.current else ""),
            "endpoint": context.endpoint,
            "admin": context.admin,
            "API key": context.api_key_file or (f"${context.api_key_env}" if context.api_key_env else ""),
        }
        for context in contexts.by_name.values()
    ]
    local = {"context": LOCAL + ("" if contexts.current else " *"), "endpoint": "the local cluster"}
    show_table([*rows, {**local, "admin": "", "API key": ""}], "")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="The context's name; without it, the one that commands use.", autocompletion=complete_context
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a context. Without a name, show what commands use here, including HEADRACE_ENDPOINT and HEADRACE_CONTEXT."""
    contexts = stored_contexts()
    target = None if name else target_of(ctx)
    if target is not None and os.environ.get("HEADRACE_CONFIG"):
        file = os.environ["HEADRACE_CONFIG"]
        err.print(f"note: HEADRACE_CONFIG is set: tenants, keys, usage and audit use the database of {file}")
    if target is not None and target.endpoint and not target.context:
        values = {"endpoint": target.endpoint, "from": ENDPOINT_VARIABLE}
        _show(values, as_json)
        return
    name = name or (target.context if target is not None else "") or LOCAL
    if name == LOCAL:
        fail(f"{LOCAL} is the local cluster, and no context is stored for it: see `headrace status`")
    try:
        _show(asdict(contexts.get(name)), as_json)
    except ContextError as error:
        fail(str(error), USAGE)


def _show(values: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    for key, value in values.items():
        if value:
            out.print(f"{key}: {value}", markup=False)


@app.command()
def remove(name: NameArgument) -> None:
    """Remove a context. If it is the current one, the local cluster becomes current."""
    try:
        _write(stored_contexts().without(name))
    except ContextError as error:
        fail(str(error), USAGE)
    out.print(f"removed {name}", markup=False)


def _write(contexts: Contexts) -> None:
    file = contexts_file()
    try:
        write_contexts(file, contexts)
    except OSError as error:
        fail(f"{file}: cannot be written: {error.strerror}")
