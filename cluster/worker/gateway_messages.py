"""The messages that gateways send to a worker.

The parts of a message are applied in the required order: for example, adapters before the Submits that name these
adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from cluster.api.types import WorkerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bulk import send_bundle
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.adapter_codec import adapter_set_from_pb
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.accounts.usage import WorkerUsage
from cluster.worker.adapters.worker_adapters import WorkerAdapters
from cluster.worker.drain_state import Drains
from cluster.worker.link import Link
from cluster.worker.link_credit import LinkCredit
from cluster.worker.renders import Renders
from cluster.worker.submits import Submits

log = structlog.get_logger("worker")


@dataclass(frozen=True, slots=True)
class GatewayMessages:
    """Applies the gateways' messages. The fields are the parts of the worker that handle them."""

    identity: WorkerIdentity
    bundle: Bundle
    credit: LinkCredit
    usage: WorkerUsage
    served: ServedReports
    adapters: WorkerAdapters
    submits: Submits
    renders: Renders
    drains: Drains

    async def apply(self, link: Link, message: pb.GatewayTurn) -> None:
        """Apply a message that was received over a link.

        Raises ValueError or LookupError if the message is invalid, LinkEnded if the link must end.
        """
        has_backlog = message.HasField("backlog")
        if message.grant_ack:
            self.credit.acknowledge(link.credit_order, message.grant_ack)
        if message.usage_acks:
            self.usage.acked(message.usage_acks)
        if message.HasField("adapters"):  # before the Submits that name them
            self.adapters.receive(link.number, adapter_set_from_pb(message.adapters))
        for takeover in message.takeovers:  # before the Submits of the gateway that resumed the call
            await self.submits.take_over(takeover.call, takeover.generation)
        for submit in message.submits:
            await self.submits.accept(link, submit)
        if has_backlog:  # sequences that still wait after these Submits
            self.credit.set_backlog(link.credit_order, message.backlog)
            self.served.forward_backlog(link.number, message.backlog)
        if message.aborts:
            await self.submits.abort(link, message.aborts)
        for render in message.renders:
            self.renders.accept(link, render)
        if message.HasField("fetch_bundle"):
            digest = message.fetch_bundle.digest
            bundle = self.bundle if digest == self.identity.bundle_digest else None
            link.spawn(send_bundle(link.blobs, digest, bundle))
        for command in message.commands:
            log.info("worker.command_received", verb=command.WhichOneof("verb"), worker=self.identity.worker_id)
            if self.drains.apply(command):
                self.credit.regrant()
        link.outbox.acked_seq = message.seq
        if message.grant_ack or has_backlog:
            self.credit.regrant()
