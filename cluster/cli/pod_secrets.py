"""`headrace pod secrets`: what the chart's pods must be given and no values file should hold, as manifests to apply."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from cluster.cli.basics import USAGE, fail
from cluster.link.admission import ANY_MODEL, CONTROLLER

DAYS = 365
CHARTS = "headrace"


def pod_secrets(
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Where the chart is installed.")] = CHARTS,
    name: Annotated[str, typer.Option("--name", help="The chart's fullnameOverride.")] = CHARTS,
    host: Annotated[
        list[str] | None, typer.Option("--host", help="A further name by which clients dial; repeat it.")
    ] = None,
    authority: Annotated[
        Path | None,
        typer.Option("--authority", help="A folder of `certs ca` to issue the link's from, for later renewals."),
    ] = None,
    days: Annotated[int, typer.Option("--days", help="How long certificates are valid.", min=1, max=3650)] = DAYS,
    with_namespace: Annotated[
        bool, typer.Option("--with-namespace", help="Begin with the namespace itself, under pod security `restricted`.")
    ] = False,
) -> None:
    """Print Secrets for the chart, new with every call: the link's and the clients' certificates, the cluster's secret,
    the pepper of keys, the database's password, Ray's token. Apply them once: `... | kubectl create -f -`."""
    try:
        found = manifests(namespace, name, host or (), authority, days, with_namespace=with_namespace)
    except (ValueError, OSError) as error:
        fail(str(error), USAGE)
    sys.stdout.write(yaml.safe_dump_all(found, sort_keys=False))


def manifests(
    namespace: str,
    name: str,
    hosts: list[str] | tuple[str, ...],
    authority: Path | None,
    days: int,
    *,
    with_namespace: bool = False,
) -> list[dict[str, object]]:
    """The objects. Raises ValueError for an authority that is none."""
    from cluster.cli import issuing

    domains = ("", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local")
    found: list[dict[str, object]] = []
    if with_namespace:
        labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn", "audit")}
        found.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}})

    def secret(suffix: str, data: Mapping[str, str], kind: str = "Opaque") -> None:
        metadata = {"name": f"{name}-{suffix}", "namespace": namespace}
        found.append({"apiVersion": "v1", "kind": "Secret", "type": kind, "metadata": metadata, "stringData": data})

    with tempfile.TemporaryDirectory() as scratch:
        link, clients = Path(scratch) / "link", Path(scratch) / "clients"
        for folder, given in ((link, authority), (clients, None)):
            folder.mkdir()
            if given is None:
                issuing.make_authority(folder / "ca.crt", folder / "ca.key", max(days, 3650))
            else:
                for file in ("ca.crt", "ca.key"):
                    (folder / file).write_bytes((given / file).read_bytes())
        links = [f"{prefix}{name}-links{domain}" for domain in domains for prefix in ("", "*.") if domain or not prefix]
        issuing.issue_server(link, "gateway", [*links, "localhost", "127.0.0.1"], days)
        issuing.issue_client(link, "worker", [ANY_MODEL], days)
        issuing.issue_client(link, "controller", [CONTROLLER], days)
        served = [f"{name}{domain}" for domain in domains]
        issuing.issue_server(clients, "tls", [*served, "localhost", "127.0.0.1", *hosts], days)
        for role in ("gateway", "worker", "controller"):
            secret(f"link-{role}", _pem(link, role), "kubernetes.io/tls")
        secret("tls", _pem(clients, "tls"), "kubernetes.io/tls")
    made = ("cluster", "key-pepper", "database-password", "auth_token")
    secret("secrets", {key: secrets.token_hex(32) for key in made})
    return found


def _pem(folder: Path, name: str) -> dict[str, str]:
    files = {"tls.crt": f"{name}.crt", "tls.key": f"{name}.key", "ca.crt": "ca.crt"}
    return {key: (folder / file).read_text() for key, file in files.items()}
