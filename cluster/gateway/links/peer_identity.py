"""Whom a gateway's link port lets in, beyond what TLS checks: a certificate must name what its holder speaks for.

The names are URIs among its subject's alternative names: `headrace://model/<name>` for a worker of that model,
`headrace://model/*` for one of any, `headrace://controller` for the controller. Without TLS, on loopback, whoever
reaches the port is let in. A Hello is taken once: epochs of an incarnation only grow, so one that is repeated ends
nobody's link.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api.types import WorkerIdentity

CONTROLLER = "headrace://controller"
ANY_MODEL = "headrace://model/*"
MOST_REMEMBERED = 4096
"""Incarnations whose last epoch is kept."""


def of_model(name: str) -> str:
    """What a certificate says for a worker of that model; `*` for every one."""
    return f"headrace://model/{name}"


def names_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """The URIs of a verified certificate, as ssl gives it."""
    found = certificate.get("subjectAltName", ()) if certificate else ()
    return frozenset(value for kind, value in found if kind == "URI")


class PeerIdentity:
    """One gateway's rule, and what it remembers of those it has let in."""

    def __init__(self, by_certificate: bool) -> None:
        """`by_certificate`: the port has TLS."""
        self._by_certificate = by_certificate
        self._epochs: dict[str, int] = {}

    def speaks_for(self, certificate: Mapping[str, Any] | None, model: str) -> bool:
        """Whether its holder may be a worker of that model."""
        return not self._by_certificate or not names_of(certificate).isdisjoint((of_model(model), ANY_MODEL))

    def controls(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether its holder may be the controller."""
        return not self._by_certificate or CONTROLLER in names_of(certificate)

    def repeated(self, identity: WorkerIdentity, epoch: int) -> bool:
        """Whether an incarnation has shown this epoch, or a later one, already; else it is remembered."""
        last = self._epochs.pop(identity.incarnation, -1)
        self._epochs[identity.incarnation] = max(last, epoch)
        if len(self._epochs) > MOST_REMEMBERED:
            del self._epochs[next(iter(self._epochs))]
        return epoch <= last
