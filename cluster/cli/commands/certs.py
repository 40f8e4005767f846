"""Certificates of the link: an authority of the cluster's own, what it issues to gateways, workers, controller, and
lists of certificates that gateways refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.ledger import show_table
from cluster.gateway.links.peer_identity import CONTROLLER, of_model
from cluster.policy.tenants.revocation_list import Revocation, Revoked, serial_of

AUTHORITY_DAYS = 3650

app = typer.Typer(no_args_is_help=True, help="Certificates for the link between workers, controller and gateways.")
FolderArgument = Annotated[Path, typer.Argument(help="The folder of the authority's files.", file_okay=False)]
ListArgument = Annotated[Path, typer.Argument(help="The list's file.", dir_okay=False)]
DaysOption = Annotated[int, typer.Option("--days", help="How long it is valid.", min=1, max=AUTHORITY_DAYS)]
NameOption = Annotated[str, typer.Option("--name", help="Of the files, NAME.crt and NAME.key.")]


@app.command("ca")
def make_authority(folder: FolderArgument) -> None:
    """Make ca.crt and ca.key. Keep ca.key away from the cluster: whoever has it can be any worker."""
    from cluster.cli import certificates

    cert_file, key_file = folder / "ca.crt", folder / "ca.key"
    if cert_file.exists() or key_file.exists():
        fail(f"{folder} has an authority already: name another folder, or issue from this one", USAGE)
    folder.mkdir(parents=True, exist_ok=True)
    certificates.make_authority(cert_file, key_file, AUTHORITY_DAYS)
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
    from cluster.cli import certificates

    _issued(name, lambda: certificates.issue_server(folder, name, host, days))


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
    from cluster.cli import certificates

    uris = [of_model(one) for one in model or ()] + ([CONTROLLER] if controller else [])
    if not uris:
        fail("name what it may be: --model NAME, --model '*' or --controller", USAGE)
    _issued(name, lambda: certificates.issue_client(folder, name, uris, days))


@app.command("revoke")
def revoke(
    file: ListArgument,
    certificates: Annotated[
        list[str], typer.Argument(metavar="CERTIFICATE...", help="A certificate's file, or its serial number.")
    ],
    issuer: Annotated[str, typer.Option("--issuer", help="Of serial numbers: the authority's name; else any.")] = "",
    note: Annotated[str, typer.Option("--note", help="Why.")] = "",
) -> None:
    """Add certificates to a list that gateways read (gateway.link_tls.revoked_serials_file, or gateway.tls's): within a
    second they refuse them, and end their links, sessions and calls. `issued` in an authority's folder has the serial
    numbers of what it issued."""
    try:
        text = file.read_text() if file.exists() else ""
        known = {(one.serial, one.issuer) for one in Revoked.parse(text).entries}
        wanted = [_revocation(one, issuer, " ".join(note.split())) for one in certificates]
        new = [one for one in wanted if (one.serial, one.issuer) not in known]
        _replace(file, "".join(f"{line}\n" for line in (*text.splitlines(), *(one.line() for one in new))))
    except (ValueError, OSError) as error:
        fail(f"{file}: {error}", USAGE)
    for one in wanted:
        out.print(f"revoked {one.serial:X}{f' of {one.issuer}' if one.issuer else ''}", markup=False)


def _replace(file: Path, text: str) -> None:
    """Whole or not at all; serial numbers are no secret."""
    draft = file.with_name(f".{file.name}.new")
    draft.write_text(text)
    draft.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
    draft.replace(file)


@app.command("list")
def list_revoked(file: ListArgument, as_json: JsonOption = False) -> None:
    """Show a list of certificates: those that are revoked, or an authority's `issued`."""
    try:
        found = Revoked.parse(file.read_text())
    except (ValueError, OSError) as error:
        fail(f"{file}: {error}", USAGE)
    rows = [{"serial": f"{one.serial:X}", "issuer": one.issuer, "note": one.note} for one in found.entries]
    if as_json:
        print_json(rows)
    else:
        show_table(rows, "no certificates")


def _revocation(text: str, issuer: str, note: str) -> Revocation:
    """Of a certificate's file, or of a serial number. Raises ValueError."""
    if not Path(text).exists():
        return Revocation(serial_of(text), issuer, note)
    from cryptography import x509

    from cluster.cli import certificates

    found = certificates.revocation_of(x509.load_pem_x509_certificate(Path(text).read_bytes()))
    return replace(found, note=note or found.note)


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
