"""A link listener that ignores all reports, for tests that do not read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.peer_backlog import ServedTotal
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

    def served(self, link: WorkerLink, totals: Sequence[WeightedValue[ServedTotal]]) -> None:
        """Implements `LinkListener.served`."""

    def peer_backlog(self, link: WorkerLink, gateway: str, waiting: Sequence[WeightedValue[FlowBacklog]]) -> None:
        """Implements `LinkListener.peer_backlog`."""

    def kv_blocks(self, link: WorkerLink, message: pb.KvBlocks) -> None:
        """Implements `LinkListener.kv_blocks`."""

    def drain_state_changed(self, link: WorkerLink) -> None:
        """Implements `LinkListener.drain_state_changed`."""

    def adapters_changed(self, link: WorkerLink) -> None:
        """Implements `LinkListener.adapters_changed`."""
