"""Commands `headrace pod secrets` and `headrace pod certificates`.

`headrace pod secrets` prints the chart's Secrets for a first install. `headrace pod certificates` prints only the
Secrets with certificates, for a renewal.

The key pepper, the cluster secret, the database password and Ray's token are printed only for a first install. These
four are in one immutable Secret, which Kubernetes protects against changes. With `--authority FOLDER`, the files that a
renewal needs are stored in FOLDER:

    FOLDER/ca.crt, ca.key            the link's authority, with the same files as from `headrace certs ca`
    FOLDER/clients/ca.crt, ca.key    the authority of the client ports' certificate; clients trust only this one
    FOLDER/clients/hosts             additional host names of the client ports, one per line
    FOLDER/issued, clients/issued    serial numbers of issued certificates, for `headrace certs revoke`
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.cli import terminal
from cluster.cli.base import USAGE, fail
from cluster.gateway.links.peer_identity import ANY_MODEL, CONTROLLER

DAYS = 365
AUTHORITY_DAYS = 3650
CHARTS = "headrace"
MADE_ONCE = ("cluster", "key-pepper", "database-password", "auth_token")
"""Keys in the Secret that is created at the first install and never replaced."""
Manifest = dict[str, object]
NamespaceOption = Annotated[str, typer.Option("--namespace", "-n", help="The namespace of the chart.")]
NameOption = Annotated[str, typer.Option("--name", help="The chart's fullnameOverride.")]
HostOption = Annotated[
    list[str] | None,
    typer.Option("--host", help="Another host name that clients dial; repeatable. Kept in the authority's folder."),
]
DaysOption = Annotated[int, typer.Option("--days", help="Days of validity of the certificates.", min=1, max=3650)]


def pod_secrets(
    namespace: NamespaceOption = CHARTS,
    name: NameOption = CHARTS,
    host: HostOption = None,
    authority: Annotated[
        Path | None,
        typer.Option(
            "--authority",
            help="A new folder that keeps the authorities for renewals. If it already has authorities, this is a "
            "renewal: only certificates are printed.",
        ),
    ] = None,
    days: DaysOption = DAYS,
    with_namespace: Annotated[
        bool, typer.Option("--with-namespace", help="Also print the namespace, with pod security `restricted`.")
    ] = False,
) -> None:
    """Print the Secrets of a first install. `... --authority FOLDER | kubectl create -f -` creates them. They hold the
    certificates of the link and of the client ports, the cluster secret, the key pepper, the database password and
    Ray's token. Run it once; `pod certificates` renews the certificates."""
    _print(lambda: manifests(namespace, name, host or (), authority, days, with_namespace=with_namespace))


def pod_certificates(
    authority: Annotated[Path, typer.Option("--authority", help="The folder that the first install made.")],
    namespace: NamespaceOption = CHARTS,
    name: NameOption = CHARTS,
    host: HostOption = None,
    days: DaysOption = DAYS,
) -> None:
    """Print new certificates and no other secret. These are the certificates of the link and of the client ports. `...
    | kubectl apply -f -` replaces the cluster's certificates with the new ones. The authorities in the folder issue the
    new certificates, so clients and workers that trust the old certificates also trust the new ones."""
    _print(lambda: renewal(namespace, name, host or (), authority, days))


def _print(make: Callable[[], Manifests]) -> None:
    try:
        made = make()
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    terminal.write(yaml.safe_dump_all(made.objects, sort_keys=False))
    for note in made.notes:
        terminal.say(note, error=True)


@dataclass(frozen=True, slots=True)
class Manifests:
    """Kubernetes objects to apply, and notes for the operator."""

    objects: Sequence[Manifest]
    notes: Sequence[str] = ()


def manifests(
    namespace: str,
    name: str,
    hosts: Sequence[str],
    authority: Path | None,
    days: int,
    *,
    with_namespace: bool = False,
) -> Manifests:
    """Return the Kubernetes objects for a first install: secrets, certificates and, if `with_namespace`, the
    namespace. If the folder `authority` already has a certificate authority, return the objects for a renewal
    of the certificates.

    `days`: how long the certificates are valid. Raises ValueError if the folder has other files than those of
    a certificate authority. Raises OSError.
    """
    objects: list[Manifest] = []
    if with_namespace:
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
        objects.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})
    if authority is not None and _is_authority(authority):
        renewed = renewal(namespace, name, hosts, authority, days)
        return Manifests([*objects, *renewed.objects], renewed.notes)
    with tempfile.TemporaryDirectory() as scratch:
        folder = authority or Path(scratch) / "authority"
        _make_missing_authorities(folder)
        objects += _certificates(folder, namespace, name, hosts, days)
    made = {key: secrets.token_hex(32) for key in MADE_ONCE}
    objects.append({**_secret(namespace, f"{name}-secrets", made, "Opaque"), "immutable": True})
    note = "The authorities' keys are not kept, so the certificates cannot be renewed: give a folder with --authority."
    return Manifests(objects, [note] if authority is None else [])


def renewal(namespace: str, name: str, hosts: Sequence[str], authority: Path, days: int) -> Manifests:
    """Issue new certificates from the authorities in a folder.

    Raises ValueError if the folder has no authority. Raises OSError if a file cannot be read or written.
    """
    if not _is_authority(authority):
        raise ValueError(f"{authority}: has no authority (ca.crt, ca.key): name the folder of the first install")
    notes = [f"Only certificates are printed: the Secret {name}-secrets stays unchanged."]
    notes += [
        f"{place} had no authority for the client ports and now has one: clients that pin a CA need "
        f"{place / 'ca.crt'} before these Secrets are applied."
        for place in _make_missing_authorities(authority)
    ]
    return Manifests(_certificates(authority, namespace, name, hosts, days), notes)


def _certificates(folder: Path, namespace: str, name: str, hosts: Sequence[str], days: int) -> list[Manifest]:
    issued = _issue(folder, namespace, name, _remember_hosts(folder, hosts), days)
    return [_secret(namespace, f"{name}-{suffix}", data, "kubernetes.io/tls") for suffix, data in issued.items()]


def _secret(namespace: str, name: str, data: Mapping[str, str], kind: str) -> Manifest:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": metadata, "stringData": data}


def _is_authority(folder: Path) -> bool:
    return (folder / "ca.crt").exists() or (folder / "ca.key").exists()


def _make_missing_authorities(folder: Path) -> list[Path]:
    """Make the authorities that a folder lacks. Returns the folders of the new authorities. Raises OSError."""
    from cluster.cli import certificates

    made = []
    for place, subject in ((folder, "headrace link authority"), (folder / "clients", "headrace client authority")):
        if not _is_authority(place):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            certificates.make_authority(place / "ca.crt", place / "ca.key", AUTHORITY_DAYS, subject)
            made.append(place)
    return made


def _remember_hosts(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Add `hosts` to the file clients/hosts in the authority's folder, which lists additional host names for the
    certificate of the client ports. Returns all host names in the file. Raises OSError."""
    file = folder / "clients" / "hosts"
    stored = file.read_text().split() if file.exists() else []
    all_hosts = list(dict.fromkeys([*stored, *hosts]))
    if all_hosts != stored:
        file.write_text("".join(f"{host}\n" for host in all_hosts))
    return all_hosts


def _issue(folder: Path, namespace: str, name: str, hosts: Sequence[str], days: int) -> dict[str, Mapping[str, str]]:
    """Issue all certificates. Returns the data of each Secret, by the suffix of the Secret's name.

    Raises ValueError if the files in `folder` are not a certificate authority.
    """
    from cluster.cli import certificates

    domains = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
    links = [f"{prefix}{name}-links{domain}" for domain in domains for prefix in ("", "*.") if domain or not prefix]
    served = [f"{name}{domain}" for domain in domains]
    with tempfile.TemporaryDirectory() as scratch:  # private keys are only printed, never kept
        link, clients = Path(scratch) / "link", Path(scratch) / "clients"
        for source, place in ((folder, link), (folder / "clients", clients)):
            place.mkdir()
            for file in ("ca.crt", "ca.key"):
                shutil.copyfile(source / file, place / file)
        certificates.issue_server(link, "gateway", [*links, "localhost", "127.0.0.1"], days)
        certificates.issue_client(link, "worker", [ANY_MODEL], days)
        certificates.issue_client(link, "controller", [CONTROLLER], days)
        certificates.issue_server(clients, "tls", [*served, "localhost", "127.0.0.1", *hosts], days)
        for source, place in ((folder, link), (folder / "clients", clients)):
            with (source / certificates.ISSUED).open("a") as issued:
                issued.write((place / certificates.ISSUED).read_text())
        pems = {f"link-{role}": _pem(link, role) for role in ("gateway", "worker", "controller")}
        return {**pems, "tls": _pem(clients, "tls")}


def _pem(folder: Path, name: str) -> dict[str, str]:
    files = {"tls.crt": f"{name}.crt", "tls.key": f"{name}.key", "ca.crt": "ca.crt"}
    return {key: (folder / file).read_text() for key, file in files.items()}
