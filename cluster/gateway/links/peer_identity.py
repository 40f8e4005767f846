"""Authorization of peers at the link port. TLS is not enough: a peer's certificate must also name the role of the peer.

The names are URIs among the subject alternative names: `headrace://model/<name>` for a worker of that model,
`headrace://model/*` for a worker of any model, `headrace://controller` for the controller. Without TLS, which is
possible only on loopback, every peer is accepted. A Hello message is accepted only once. It carries an epoch, the
number of the connection, which must increase while the worker's process lives. A replayed Hello therefore cannot end
another peer's link. Epochs are remembered by model, worker id and incarnation. A certificate proves the model, so no
Hello of another model's worker can bar a worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import structlog

from cluster.api.types import WorkerIdentity
from cluster.gateway.links.worker_link import WorkerLink

log = structlog.get_logger("hub")

CONTROLLER = "headrace://controller"
ANY_MODEL = "headrace://model/*"
MOST_REMEMBERED = 4096
"""Maximum number of models, and of incarnations of each model, whose last epochs are remembered."""


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
        self._epochs: dict[str, dict[tuple[str, str], int]] = {}
        """By model, the last epoch of each worker id and incarnation."""

    def may_serve(self, certificate: Mapping[str, Any] | None, model: str) -> bool:
        """Return whether the certificate's holder may be a worker of the model."""
        return not self._by_certificate or not uris_of(certificate).isdisjoint((model_uri(model), ANY_MODEL))

    def may_control(self, certificate: Mapping[str, Any] | None) -> bool:
        """Return whether the certificate's holder may be the controller."""
        return not self._by_certificate or CONTROLLER in uris_of(certificate)

    def is_known(self, worker: WorkerIdentity) -> bool:
        """Return whether this start of the worker's process was linked here before."""
        return (worker.worker_id, worker.incarnation) in self._epochs.get(worker.model, ())

    def is_replayed(self, identity: WorkerIdentity, epoch: int) -> bool:
        """Return whether this start of the worker's process has already used this epoch (connection number) or a later
        one. Also remembers the epoch."""
        known = self._epochs.pop(identity.model, {})
        self._epochs[identity.model] = known
        if len(self._epochs) > MOST_REMEMBERED:
            del self._epochs[next(iter(self._epochs))]
        key = (identity.worker_id, identity.incarnation)
        last = known.pop(key, -1)
        known[key] = max(last, epoch)
        if len(known) > MOST_REMEMBERED:  # of this model alone: others' workers are not forgotten
            del known[next(iter(known))]
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

    async def require_model(self, model: str) -> None:
        """Abort the stream if the peer's certificate does not allow it to serve the model."""
        if not self._identity.may_serve(self._certificate, model):
            await self._refuse(model_uri(model))

    async def permitted(self, links: Sequence[WorkerLink], wanted: str = "") -> WorkerLink | None:
        """Return the one of these links whose model the peer may serve; None if there are no links. Abort the stream if
        the peer may serve the model of none. `wanted`: the name that the error reports as missing."""
        for link in links:
            if self._identity.may_serve(self._certificate, link.identity.model):
                return link
        if links:
            await self._refuse(wanted or model_uri(links[0].identity.model))
        return None

    async def require_worker(self, worker: WorkerIdentity, epoch: int, linked: Sequence[WorkerLink]) -> None:
        """Abort the stream if the peer may not begin this epoch (connection) of the worker. `linked`: the links with
        the same worker id. A worker that was never linked here may not take the id of another model's worker."""
        await self.require_model(worker.model)
        if not self._identity.is_known(worker):
            for link in linked:
                if not self._identity.may_serve(self._certificate, link.identity.model):
                    await self._refuse(model_uri(worker.model))
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
