"""The options that select a cluster: --endpoint, --admin, --api-key-file, --tls-ca and --context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from cluster.cli.common import USAGE, AdminOption, ApiKeyOption, EndpointOption, TlsCaOption, fail
from cluster.cli.shared_options import Command, with_options
from cluster.cli.target.contexts import (
    VARIABLE,
    ClusterTarget,
    ContextError,
    Contexts,
    TypedOptions,
    contexts_file,
    read_contexts,
    select_target,
)


def stored_contexts() -> Contexts:
    """Return the user's contexts. An invalid file ends the command with exit code 2."""
    try:
        return read_contexts(contexts_file())
    except ContextError as error:
        fail(str(error), USAGE)


def complete_context(incomplete: str) -> list[str]:
    """Return the names of contexts that begin with the typed text, for shell completion."""
    try:
        return [name for name in read_contexts(contexts_file()).by_name if name.startswith(incomplete)]
    except ContextError:
        return []


ContextOption = Annotated[
    str | None,
    typer.Option(
        "--context",
        envvar=VARIABLE,
        help="A cluster of `headrace context list`; local is the local cluster.",
        show_default="the current one",
        autocompletion=complete_context,
    ),
]
CALLER_OPTIONS: dict[str, Any] = {
    "endpoint": EndpointOption,
    "api_key_file": ApiKeyOption,
    "tls_ca": TlsCaOption,
    "context_name": ContextOption,
}
ADMIN_OPTIONS: dict[str, Any] = {"admin": AdminOption, **CALLER_OPTIONS}


def typed_names(ctx: typer.Context, names: Iterable[str]) -> frozenset[str]:
    """Return the parameters among `names` that the user gave on the command line, not by an environment variable.

    A `--context` before the command's name counts too.
    """
    typed = {name for name in names if _is_typed(ctx, name)}
    return frozenset(typed | ({"context_name"} if _is_typed(root_of(ctx), "context_name") else set()))


def root_of(ctx: typer.Context) -> typer.Context:
    """Return typer's context of the whole command line, which has the options before the command's name."""
    return cast(typer.Context, ctx.find_root())


def _is_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def target_of(ctx: typer.Context) -> ClusterTarget:
    """Return the cluster that a command's options, the environment and the contexts select.

    If they contradict each other, or a file is invalid, the command ends with exit code 2.
    """
    given = {name: ctx.params.get(name) for name in ADMIN_OPTIONS if _is_typed(ctx, name)}
    if "context_name" not in given and _is_typed(root_of(ctx), "context_name"):
        given["context_name"] = root_of(ctx).params["context_name"]
    admin = given.get("admin") or ""
    options = TypedOptions(
        context=given.get("context_name") or "",
        endpoint=given.get("endpoint") or "",
        admin=admin if isinstance(admin, str) else ",".join(admin),  # `abort` and `explain request` take several
        api_key_file=_path(given.get("api_key_file")),
        tls_ca=_path(given.get("tls_ca")),
    )
    try:
        return select_target(options, os.environ, stored_contexts())
    except ContextError as error:
        fail(str(error), USAGE)


def _path(value: Any) -> Path | None:
    return None if value is None else Path(value)


def with_target(command: Command) -> Command:
    """Decorate a command that makes calls: add the options that select a cluster, and pass a ClusterTarget as
    `target`."""
    return with_options("target", CALLER_OPTIONS, lambda ctx, _: contextlib.nullcontext(target_of(ctx)))(command)


def with_admin_target(command: Command) -> Command:
    """Decorate a command of operators: like with_target, and add the option --admin."""
    return with_options("target", ADMIN_OPTIONS, lambda ctx, _: contextlib.nullcontext(target_of(ctx)))(command)
