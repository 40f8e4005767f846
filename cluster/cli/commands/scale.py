"""scale, freeze, unfreeze and explain scaling: how many replicas models have. The controller answers them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import scaling_pb2 as pb
from cluster.cli.access import reach
from cluster.cli.commands.status import Admin, plain
from cluster.cli.common import (
    USAGE,
    AdminOption,
    ApiKeyOption,
    EndpointOption,
    JsonOption,
    TlsCaOption,
    fail,
    out,
    print_json,
    rpc_errors,
)

explain_app = typer.Typer(help="Why something is as it is.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.", show_default=False)]
AnyModelArgument = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A model's name or alias; without it, all models.", show_default=False)
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.")]


def scale(
    model: ModelArgument,
    replicas: Annotated[str, typer.Argument(metavar="N|auto", help="So many, or as the demand needs.")],
    reason: ReasonOption = "",
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Set a model's number of replicas, whatever the demand, until `scale MODEL auto`. Nothing that runs is cut."""
    request = pb.ScaleRequest(name=model, reason=reason)
    if replicas == "auto":
        request.auto = True
    elif replicas.isdecimal() and int(replicas) < 1 << 31:
        request.replicas = int(replicas)
    else:
        fail(f"N|auto: {replicas!r} is neither a number of replicas nor auto", USAGE)
    answer = _ask("catalog", "Scale", request, endpoint, admin, api_key_file, tls_ca)
    _show([answer.model], as_json)


def freeze(
    model: AnyModelArgument = "",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Keep the number of replicas as it is, of one model or of all, and roll nothing out. What fails is replaced."""
    request = pb.FreezeRequest(name=model, reason=reason)
    _show(_ask("catalog", "Freeze", request, endpoint, admin, api_key_file, tls_ca).models, as_json)


def unfreeze(
    model: AnyModelArgument = "",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """End a freeze. Without a model that of all; models that are frozen by name stay so."""
    request = pb.UnfreezeRequest(name=model, reason=reason)
    _show(_ask("catalog", "Unfreeze", request, endpoint, admin, api_key_file, tls_ca).models, as_json)


@explain_app.command("scaling")
def explain_scaling(
    model: ModelArgument,
    last: Annotated[int, typer.Option("--last", help="At most so many decisions; 0 is all.", min=0)] = 20,
    as_json: JsonOption = False,
    endpoint: EndpointOption = None,
    admin: AdminOption = None,
    api_key_file: ApiKeyOption = None,
    tls_ca: TlsCaOption = None,
) -> None:
    """Why a model has as many replicas as it has: the last decisions, each with the numbers that it was made on."""
    request = pb.ExplainScalingRequest(name=model, limit=last)
    answer = _ask("fleet", "ExplainScaling", request, endpoint, admin, api_key_file, tls_ca)
    if as_json:
        print_json({**plain(answer), "now": dict(answer.now)})
        return
    out.print(_model_table([answer.model]))
    if answer.decisions:
        out.print(_decision_table(answer.decisions))
    if answer.now:
        out.print("now: " + _numbers(answer.now), markup=False)


def _ask(service: str, verb: str, request: Any, endpoint: Any, admin: Any, api_key_file: Any, tls_ca: Any) -> Any:
    access = reach(endpoint, admin, api_key_file, tls_ca)
    api = Admin(access)
    try:
        with rpc_errors(access.address):
            return api.ask(service, verb, request)
    finally:
        api.close()


def _show(models: Sequence[pb.ModelScaling], as_json: bool) -> None:
    if as_json:
        print_json([plain(model) for model in models])
    else:
        out.print(_model_table(models))


def _model_table(models: Sequence[pb.ModelScaling]) -> Table | str:
    if not models:
        return "no models"
    table = Table("model", "replicas", "wanted", "of", "by", "cold start", "why", box=None, pad_edge=False)
    for one in models:
        there = f"{one.running}" + (f" and {one.starting} starting" if one.starting else "")
        bounds = f"{one.min_replicas} to {one.max_replicas}"
        cold = f"{one.cold_start_s:.1f} s" if one.cold_start_s else "not known"
        table.add_row(*map(escape, (one.name, there, str(one.desired), bounds, one.by, cold, one.why)))
    return table


def _decision_table(decisions: Sequence[pb.ScalingDecision]) -> Table:
    table = Table("at", "decision", "replicas", "passes", "why", "numbers", box=None, pad_edge=False)
    for one in decisions:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.at_s))
        change = (
            f"{one.replicas_before} to {one.replicas}" if one.replicas != one.replicas_before else f"{one.replicas}"
        )
        table.add_row(*map(escape, (at, one.action, change, str(one.passes), one.why, _numbers(one.numbers))))
    return table


def _numbers(numbers: Any) -> str:
    return "  ".join(f"{name} {numbers[name]:.4g}" for name in sorted(numbers))
