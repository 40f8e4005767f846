"""The complete command line. Each command imports its heavy dependencies only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.cli.base import EXIT_CODES, FAILED, OK
from cluster.cli.commands import certs, chat, config, context, db, doctor, embed, plan, version
from cluster.cli.commands.operate import (
    adapters,
    drain,
    explain,
    model_list,
    models,
    scale,
    slo,
    status,
    support_bundle,
    tenants,
    top,
    traces,
    usage,
)
from cluster.cli.commands.run import up
from cluster.cli.common import JsonOption, out, print_json
from cluster.cli.process_commands import add_processes
from cluster.cli.target.target_options import ContextOption

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Host open models on your own GPUs: a gRPC gateway over vLLM engines that Ray Serve places.",
    epilog=f"""{EXIT_CODES}

Which cluster: options, else HEADRACE_CONTEXT or HEADRACE_ENDPOINT (with HEADRACE_API_KEY and HEADRACE_TLS_CA; both set
is an error), else the context of `headrace context use`, else the local cluster. HEADRACE_CONFIG names the file of -f:
commands about tenants, keys, usage and audit prefer it to the other variables and to the current context.""",
)


@app.callback()
def headrace(
    context_name: ContextOption = None,
    version_only: Annotated[
        bool,
        typer.Option("--version", callback=version.print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Declare the options that come before the command's name. `target_of` reads the value of `--context`."""


app.command()(up.up)
app.command()(up.down)
app.command()(status.status)
app.command()(chat.chat)
app.command()(chat.complete)
app.command()(embed.embed)
app.command()(embed.rerank)
app.command()(plan.plan)
app.command()(status.workers)
app.command()(status.abort)
app.command()(top.top)
for verb in (drain.drain, drain.cordon, drain.uncordon, scale.scale, scale.freeze, scale.unfreeze):
    app.command()(verb)
app.command()(models.apply)
app.command()(models.diff)
models_app = typer.Typer(help="List models, show one, choose which versions get calls.")
models_app.callback(invoke_without_command=True)(model_list.models)
models_app.command("list")(model_list.list_models)
for model_verb in (models.get, models.pin, models.promote, models.rollback, models.quarantine):
    models_app.command()(model_verb)
models_app.command("weigh")(models.weigh)
app.add_typer(models_app, name="models")
scale.explain_app.command("request")(explain.explain_request)
app.add_typer(scale.explain_app, name="explain")
app.add_typer(adapters.app, name="adapters")
app.add_typer(config.app, name="config")
app.add_typer(context.app, name="context")
app.add_typer(certs.app, name="certs")
app.add_typer(tenants.tenants_app, name="tenants")
app.add_typer(tenants.keys_app, name="keys")
app.command()(usage.usage)
app.command()(slo.slo)
app.command()(traces.traces)
app.command()(usage.audit)
app.add_typer(db.db_app, name="db")
app.add_typer(db.import_app, name="import")
app.command()(support_bundle.support_bundle)
app.command()(version.version)
app.command()(version.completion)
add_processes(app)


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """List what this machine lacks, and how to install it."""
    findings = doctor.examine()
    if as_json:
        print_json([{"name": f.name, "missing": f.missing, "remedy": f.remedy, "found": f.found} for f in findings])
    else:
        out.print(doctor.report(findings), markup=False)
    raise typer.Exit(FAILED if any(finding.missing for finding in findings) else OK)
