"""Authorization of peers at the link port. TLS is not enough: a peer's certificate must also name the role of the peer.

The names are URIs among the subject alternative names: `headrace://model/<name>` for a worker of that model,
`headrace://model/*` for a worker of any model, `headrace://controller` for the controller. Without TLS, which is
possible only on loopback, every peer is accepted. A Hello message is accepted only once. It carries an epoch, the
number of the connection, which must increase while the worker's process lives. A replayed Hello therefore cannot end
another peer's link.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import structlog

from cluster.api.types import WorkerIdentity

log = structlog.get_logger("hub")

CONTROLLER = "headrace://controller"
ANY_MODEL = "headrace://model/*"
MOST_REMEMBERED = 4096
"""Maximum number of incarnations whose last epoch is remembered."""


def model_uri(name: str) -> str:
    """Return the URI that the certificates of a model's workers must contain. The name `*` is for all models."""
    return f"headrace://model/{name}"


def uris_of(certificate: Mapping[str, Any] | None) -> frozenset[str]:
    """Return the URIs of a verified certificate, given as the dict from ssl's getpeercert."""
    names = certificate.get("subjectAltName", ()) if certificate else ()
    return frozenset(value for kind, value in names if kind == "URI")


class PeerIdentity:
    """Checker of the peers at one gateway's link port. It remembers the epochs (numbers of connections) that were
    accepted."""

    def __init__(self, by_certificate: bool) -> None:
        """`by_certificate`: whether the port has TLS. Certificates are checked only with TLS."""
        self._by_certificate = by_certificate
        self._epochs: dict[str, int] = {}

    def may_serve(self, certificate: Mapping[str, Any] | None, model: str) -> bool:
        """Return whether the certificate's holder may be a worker of the model."""
        return not self._by_certificate or not uris_of(certificate).isdisjoint((model_uri(model), ANY_MODEL))

    def may_control(self, certificate: Mapping[str, Any] | None) -> bool:
        """Return whether the certificate's holder may be the controller."""
        return not self._by_certificate or CONTROLLER in uris_of(certificate)

    def is_replayed(self, identity: WorkerIdentity, epoch: int) -> bool:
        """Return whether this start of the worker's process has already used this epoch (connection number) or a later
        one. Also remembers the epoch."""
        last = self._epochs.pop(identity.incarnation, -1)
        self._epochs[identity.incarnation] = max(last, epoch)
        if len(self._epochs) > MOST_REMEMBERED:
            del self._epochs[next(iter(self._epochs))]
        return epoch <= last


class LinkPeer:
    """The peer of one stream of the link service. Each method aborts the stream if the certificate does not permit the
    peer's role.

    The error reveals only that the certificate is wrong.
    """

    def __init__(self, context: Any, identity: PeerIdentity) -> None:
        self._context = context
        self._identity = identity
        self._certificate = context.peer_certificate()

    async def require_controller(self, wanted: str = CONTROLLER) -> None:
        """Abort the stream unless the peer's certificate allows it to be a controller. `wanted`: the name that the
        error reports as missing in the certificate."""
        if not self._identity.may_control(self._certificate):
            await self._refuse(wanted)

    async def require_model(self, model: str, wanted: str = "") -> None:
        """Abort the stream if the peer's certificate does not allow it to serve the model. `wanted`: the name that the
        error reports as missing in the certificate; by default the URI of the model."""
        if not self._identity.may_serve(self._certificate, model):
            await self._refuse(wanted or model_uri(model))

    async def require_worker(self, worker: WorkerIdentity, epoch: int, linked: WorkerIdentity | None) -> None:
        """Abort the stream if the peer may not begin this epoch (connection) of the worker. `linked`: the connected
        worker with the same id, None if there is none. The new connection replaces the connection of `linked`, so the
        peer must be permitted to serve the model of `linked`, too."""
        for model in {worker.model, worker.model if linked is None else linked.model}:
            await self.require_model(model, model_uri(worker.model))
        if self._identity.is_replayed(worker, epoch):
            await self._context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"hello: this incarnation has already used epoch {epoch} or a later one",
            )

    async def _refuse(self, name: str) -> None:
        log.warning("link.peer_refused", peer=self._context.peer(), missing_name=name)
        await self._context.abort(
            grpc.StatusCode.PERMISSION_DENIED,
            f"the client certificate does not name {name} (see `headrace certs worker --help`)",
        )
