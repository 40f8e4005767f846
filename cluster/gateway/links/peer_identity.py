"""Authorization of peers at the link port, beyond TLS: a certificate must name the role of its holder.

The names are URIs among the subject alternative names: `headrace://model/<name>` for a worker of that model,
`headrace://model/*` for a worker of any model, `headrace://controller` for the controller. Without TLS, on loopback,
every peer is accepted. Each Hello is accepted once: epochs of an incarnation only increase, so a replayed Hello cannot
end the link of another connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.api.types import WorkerIdentity

CONTROLLER = "headrace://controller"
ANY_MODEL = "headrace://model/*"
MOST_REMEMBERED = 4096
"""Maximum number of incarnations whose last epoch is remembered."""


def model_uri(name: str) -> str:
    """The URI in the certificate of a model's workers; `*` stands for all models."""
    return f"headrace://model/{name}"


def uris_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """The URIs of a verified certificate, from the dict of ssl's getpeercert."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    return frozenset(value for kind, value in names if kind == "URI")


class PeerIdentity:
    """Checks the peers of one gateway's link port, and remembers the epochs that it has accepted."""

    def __init__(self, by_certificate: bool) -> None:
        """`by_certificate`: the port has TLS."""
        self._by_certificate = by_certificate
        self._epochs: dict[str, int] = {}

    def may_serve(self, certificate: Mapping[str, Any] | None, model: str) -> bool:
        """Whether the certificate's holder may be a worker of the model."""
        return not self._by_certificate or not uris_of(certificate).isdisjoint((model_uri(model), ANY_MODEL))

    def may_control(self, certificate: Mapping[str, Any] | None) -> bool:
        """Whether the certificate's holder may be the controller."""
        return not self._by_certificate or CONTROLLER in uris_of(certificate)

    def is_replayed(self, identity: WorkerIdentity, epoch: int) -> bool:
        """Whether this incarnation has already used this epoch or a later one. Remembers the epoch."""
        last = self._epochs.pop(identity.incarnation, -1)
        self._epochs[identity.incarnation] = max(last, epoch)
        if len(self._epochs) > MOST_REMEMBERED:
            del self._epochs[next(iter(self._epochs))]
        return epoch <= last
