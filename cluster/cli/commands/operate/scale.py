"""The commands `scale`, `freeze`, `unfreeze` and `explain scaling`, which set and explain the numbers of replicas.

The controller executes the changes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from cluster.admin.v1 import scaling_pb2 as pb
from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.confirmation import YesOption, confirm
from cluster.cli.target.admin_client import Admin, plain, with_admin

explain_app = typer.Typer(
    help="Explain where a call went, or a model's replica count.",
    no_args_is_help=True,
)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.", show_default=False)]
AnyModelArgument = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A model's name or alias; without it, all models.", show_default=False)
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.")]
NEGLIGIBLE = 1e-9
"""Numbers with a smaller absolute value are shown as 0."""


@with_admin
def scale(
    api: Admin,
    model: ModelArgument,
    replicas: Annotated[str, typer.Argument(metavar="N|auto", help="A fixed number, or auto to follow demand.")],
    reason: ReasonOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fix a model's number of replicas until `scale MODEL auto`. Demand no longer changes it; no running call is cut
    off. With 0 the model takes no calls, and the command asks first."""
    request = pb.ScaleRequest(name=model, reason=reason)
    if replicas == "auto":
        request.auto = True
    elif replicas.isdecimal() and int(replicas) < 1 << 31:
        request.replicas = int(replicas)
    else:
        fail(f"N|auto: {replicas!r} is neither a number of replicas (0 to {(1 << 31) - 1}) nor auto", USAGE)
    if replicas != "auto" and not request.replicas:
        confirm(f"Stop all replicas of {model} at {api.where}?", yes)
    answer = api.ask("catalog", "Scale", request)
    _show([answer.model], as_json)


@with_admin
def freeze(api: Admin, model: AnyModelArgument = "", reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Freeze one model or all: no scaling, no new versions. Failed replicas are replaced. Undo with `unfreeze`."""
    request = pb.FreezeRequest(name=model, reason=reason)
    _show(api.ask("catalog", "Freeze", request).models, as_json)


@with_admin
def unfreeze(api: Admin, model: AnyModelArgument = "", reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """End a freeze. Without MODEL, end the freeze of all models; a model that was frozen by name stays frozen."""
    request = pb.UnfreezeRequest(name=model, reason=reason)
    _show(api.ask("catalog", "Unfreeze", request).models, as_json)


@explain_app.command("scaling")
@with_admin
def explain_scaling(
    api: Admin,
    model: ModelArgument,
    last: Annotated[int, typer.Option("--last", help="Maximum number of decisions; 0 means all.", min=0)] = 20,
    as_json: JsonOption = False,
) -> None:
    """Explain a model's number of replicas. Shows the last decisions, each with the numbers it was based on."""
    request = pb.ExplainScalingRequest(name=model, limit=last)
    answer = api.ask("fleet", "ExplainScaling", request)
    if as_json:
        print_json({**plain(answer), "now": dict(answer.now)})
        return
    out.print(_model_table([answer.model]))
    if answer.decisions:
        out.print(_decision_table(answer.decisions))
    if answer.now:
        out.print("now: " + _numbers(answer.now), markup=False)
    if link := api.console_link("scaling"):
        out.print(f"in the console: {link}", markup=False)


def _show(models: Sequence[pb.ModelScaling], as_json: bool) -> None:
    if as_json:
        print_json([plain(model) for model in models])
    else:
        out.print(_model_table(models))


def _model_table(models: Sequence[pb.ModelScaling]) -> Table | str:
    if not models:
        return "no models"
    table = Table("model", "replicas", "wanted", "of", "by", "cold start", "why", box=None, pad_edge=False)
    for model in models:
        running = f"{model.running}" + (f" and {model.starting} starting" if model.starting else "")
        bounds = f"{model.min_replicas} to {model.max_replicas}"
        cold = f"{model.cold_start_s:.1f} s" if model.cold_start_s else "not known"
        table.add_row(*map(escape, (model.name, running, str(model.desired), bounds, model.by, cold, model.why)))
    return table


def _decision_table(decisions: Sequence[pb.ScalingDecision]) -> Table:
    table = Table("at", "decision", "replicas", "passes", "why", "numbers", box=None, pad_edge=False)
    for decision in decisions:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(decision.at_s))
        before, after = decision.replicas_before, decision.replicas
        change = f"{before} to {after}" if after != before else f"{after}"
        cells = (at, decision.action, change, str(decision.passes), decision.why, _numbers(decision.numbers))
        table.add_row(*map(escape, cells))
    return table


def _numbers(numbers: Any) -> str:
    shown = {name: 0.0 if abs(numbers[name]) < NEGLIGIBLE else numbers[name] for name in sorted(numbers)}
    return "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
