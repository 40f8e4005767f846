"""Certificates of the link: an authority of the cluster's own, and what it issues to gateways, workers, controller."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import USAGE, fail, out
from cluster.link.admission import CONTROLLER, of_model

AUTHORITY_DAYS = 3650

app = typer.Typer(no_args_is_help=True, help="Certificates for the link between workers, controller and gateways.")
FolderArgument = Annotated[Path, typer.Argument(help="The folder of the authority's files.", file_okay=False)]
DaysOption = Annotated[int, typer.Option("--days", help="How long it is valid.", min=1, max=AUTHORITY_DAYS)]
NameOption = Annotated[str, typer.Option("--name", help="Of the files, NAME.crt and NAME.key.")]


@app.command("ca")
def make_authority(folder: FolderArgument) -> None:
    """Make ca.crt and ca.key. Keep ca.key away from the cluster: whoever has it can be any worker."""
    from cluster.cli import issuing

    cert_file, key_file = folder / "ca.crt", folder / "ca.key"
    if cert_file.exists() or key_file.exists():
        fail(f"{folder} has an authority already: name another folder, or issue from this one", USAGE)
    folder.mkdir(parents=True, exist_ok=True)
    issuing.make_authority(cert_file, key_file, AUTHORITY_DAYS)
    _say(cert_file, key_file)


@app.command("gateway")
def issue_gateway(
    folder: FolderArgument,
    host: Annotated[list[str], typer.Option("--host", help="A name or address by which it is dialled; repeat it.")],
    name: NameOption = "gateway",
    days: DaysOption = 90,
) -> None:
    """Issue a gateway's certificate. Issued again under the same name it replaces the last one, and a running gateway
    takes it for its next connection."""
    from cluster.cli import issuing

    _issued(name, lambda: issuing.issue_server(folder, name, host, days))


@app.command("worker")
def issue_worker(
    folder: FolderArgument,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may serve, `*` for every one; repeat it.")
    ] = None,
    controller: Annotated[bool, typer.Option("--controller", help="It may be the controller.")] = False,
    name: NameOption = "worker",
    days: DaysOption = 90,
) -> None:
    """Issue a certificate to those who dial: workers of the models named, or the controller. Issued again under the
    same name it replaces the last one, and is shown when a link is dialled next."""
    from cluster.cli import issuing

    uris = [of_model(one) for one in model or ()] + ([CONTROLLER] if controller else [])
    if not uris:
        fail("name what it may be: --model NAME, --model '*' or --controller", USAGE)
    _issued(name, lambda: issuing.issue_client(folder, name, uris, days))


def _issued(name: str, issue: Callable[[], tuple[Path, Path]]) -> None:
    if name == "ca" or Path(name).name != name:
        fail(f"--name {name!r}: name files other than the authority's, in its folder", USAGE)
    try:
        _say(*issue())
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)


def _say(*files: Path) -> None:
    for file in files:
        out.print(f"wrote {file}", markup=False)
