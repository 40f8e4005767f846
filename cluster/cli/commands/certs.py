"""Commands for link certificates.

The commands make an authority, issue certificates for gateways, workers and the controller, and maintain the lists of
revoked certificates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.ledger import show_table
from cluster.gateway.links.peer_identity import CONTROLLER, model_uri
from cluster.policy.tenants.revocation_list import Revocation, RevocationList, serial_of

AUTHORITY_DAYS = 3650

app = typer.Typer(no_args_is_help=True, help="Certificates of the links to gateways.")
FolderArgument = Annotated[Path, typer.Argument(help="The folder with the authority's files.", file_okay=False)]
ListArgument = Annotated[Path, typer.Argument(help="The file with the list.", dir_okay=False)]
DaysOption = Annotated[int, typer.Option("--days", help="Days of validity.", min=1, max=AUTHORITY_DAYS)]
NameOption = Annotated[str, typer.Option("--name", help="Name of the files: NAME.crt and NAME.key.")]


@app.command("ca")
def make_authority(folder: FolderArgument) -> None:
    """Make an authority: ca.crt and ca.key. Keep ca.key off the cluster: its holder can pose as any worker."""
    from cluster.cli import certificates

    cert_file, key_file = folder / "ca.crt", folder / "ca.key"
    if cert_file.exists() or key_file.exists():
        fail(f"{folder} already has an authority: name another folder, or issue certificates from this one", USAGE)
    folder.mkdir(parents=True, exist_ok=True)
    certificates.make_authority(cert_file, key_file, AUTHORITY_DAYS)
    _print_written(cert_file, key_file)


@app.command("gateway")
def issue_gateway(
    folder: FolderArgument,
    host: Annotated[list[str], typer.Option("--host", help="A host name or address that links dial; repeatable.")],
    name: NameOption = "gateway",
    days: DaysOption = 90,
) -> None:
    """Issue a gateway's certificate. The same name replaces the previous certificate, and a running gateway uses the
    new one from its next connection."""
    from cluster.cli import certificates

    _issue(name, lambda: certificates.issue_server(folder, name, host, days))


@app.command("worker")
def issue_worker(
    folder: FolderArgument,
    model: Annotated[
        list[str] | None, typer.Option("--model", help="A model that the worker may serve, `*` for all; repeatable.")
    ] = None,
    controller: Annotated[bool, typer.Option("--controller", help="Allow the controller's role.")] = False,
    name: NameOption = "worker",
    days: DaysOption = 90,
) -> None:
    """Issue a client certificate for workers or the controller. Workers may serve the named models only. The same name
    replaces the previous certificate, and the new one is used from the next link on."""
    from cluster.cli import certificates

    uris = [model_uri(pattern) for pattern in model or ()] + ([CONTROLLER] if controller else [])
    if not uris:
        fail("no role given: add --model NAME, --model '*' or --controller", USAGE)
    _issue(name, lambda: certificates.issue_client(folder, name, uris, days))


@app.command("revoke")
def revoke(
    file: ListArgument,
    certificates: Annotated[
        list[str], typer.Argument(metavar="CERTIFICATE...", help="A certificate's file, or its serial number.")
    ],
    issuer: Annotated[
        str, typer.Option("--issuer", help="The authority's name, for serial numbers; without it, any authority.")
    ] = "",
    note: Annotated[str, typer.Option("--note", help="The reason.")] = "",
) -> None:
    """Add certificates to a list of revoked ones. Gateways read the list from `revoked_serials_file` of
    gateway.link_tls or gateway.tls. Within a second they refuse the certificates, and end their links, sessions and
    calls. The serial numbers that an authority issued are in the file `issued` of its folder."""
    try:
        text = file.read_text() if file.exists() else ""
        known = {(entry.serial, entry.issuer) for entry in RevocationList.parse(text).entries}
        revocations = [_revocation(certificate, issuer, " ".join(note.split())) for certificate in certificates]
        new = [entry for entry in revocations if (entry.serial, entry.issuer) not in known]
        _replace(file, "".join(f"{line}\n" for line in (*text.splitlines(), *(entry.line() for entry in new))))
    except (ValueError, OSError) as error:
        fail(f"{file}: {error}", USAGE)
    for entry in revocations:
        out.print(f"revoked {entry.serial:X}{f' of {entry.issuer}' if entry.issuer else ''}", markup=False)


def _replace(file: Path, text: str) -> None:
    """Replace a list of revoked certificates atomically. A new file is readable by all users, because the serial
    numbers in it are not secret."""
    draft = file.with_name(f".{file.name}.new")
    draft.write_text(text)
    draft.chmod(file.stat().st_mode & 0o777 if file.exists() else 0o644)
    draft.replace(file)


@app.command("list")
def list_revoked(file: ListArgument, as_json: JsonOption = False) -> None:
    """Show a list of revoked or of issued certificates. The issued ones are listed in the file `issued` in an
    authority's folder."""
    try:
        listed = RevocationList.parse(file.read_text())
    except (ValueError, OSError) as error:
        fail(f"{file}: {error}", USAGE)
    rows = [{"serial": f"{entry.serial:X}", "issuer": entry.issuer, "note": entry.note} for entry in listed.entries]
    if as_json:
        print_json(rows)
    else:
        show_table(rows, "no certificates")


def _revocation(text: str, issuer: str, note: str) -> Revocation:
    """Return the revocation entry for a certificate, given as a file or as a serial number. Raises ValueError."""
    if not Path(text).exists():
        return Revocation(serial_of(text), issuer, note)
    from cryptography import x509

    from cluster.cli import certificates

    entry = certificates.revocation_of(x509.load_pem_x509_certificate(Path(text).read_bytes()))
    return replace(entry, note=note or entry.note)


def _issue(name: str, issue: Callable[[], tuple[Path, Path]]) -> None:
    if name == "ca" or Path(name).name != name:
        fail(f"--name {name!r}: must be a plain file name other than the authority's `ca`", USAGE)
    try:
        _print_written(*issue())
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)


def _print_written(*files: Path) -> None:
    for file in files:
        out.print(f"wrote {file}", markup=False)
