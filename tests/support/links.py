"""Parts of links for tests: a listener that ignores all reports, and the Hello of a worker that a test plays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.fairness_codec import FlowBacklog, WeightedValue
from cluster.wire.ended_requests import EndedUsage


class NoListener:
    """A LinkListener that ignores all reports."""

    def token_gaps(self, model: str) -> Callable[[float, int], None]:
        """Implements `LinkListener.token_gaps`."""
        return lambda gap_s, count: None

    def step_begun(self, link: WorkerLink, resumed: bool) -> None:
        """Implements `LinkListener.step_begun`."""

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Implements `LinkListener.usage`."""

    def served(
        self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]], *, continues: bool = False
    ) -> None:
        """Implements `LinkListener.served`."""

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Implements `LinkListener.peer_backlog`."""

    def kv_blocks(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Implements `LinkListener.kv_blocks`."""

    def drain_state_changed(self, link: WorkerLink) -> None:
        """Implements `LinkListener.drain_state_changed`."""

    def adapters_changed(self, link: WorkerLink) -> None:
        """Implements `LinkListener.adapters_changed`."""


def played_hello(bundle: Bundle, incarnation: str) -> pb.Hello:
    """Return the Hello of a worker of the model `mad` that a test plays by itself."""
    return pb.Hello(
        protocol_min=1,
        protocol_max=1,
        worker_id="mad",
        incarnation=incarnation,
        model="mad",
        epoch=1,
        bundle_digest=bundle.digest,
        max_model_len=2048,
        max_num_seqs=8,
        vocab_size=300,
    )
