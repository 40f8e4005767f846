"""A worker's word to the gateways about fair turns: whom it has served, and who waits at each other gateway.

Gateways do not know each other; whoever has work to share dials all of them. So what one gateway tells of its line is
handed on to the others, and what a worker has served is told to all. Nothing here is done for each token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.served_tokens import ServedMeter
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights
from cluster.wire.fairness_codec import WeightedValue, flows_from_pb
from cluster.wire.outbox import Outbox


class ServedReports:
    """Of one worker. Links go by their numbers."""

    def __init__(self) -> None:
        self._meter = ServedMeter()
        self._service = ServiceWeights()
        self._weights: dict[str, float] = {}
        self._links: dict[int, tuple[str, Outbox]] = {}

    def attach(self, number: int, gateway: str, outbox: Outbox) -> None:
        """A new link: it is told at once where its account begins, though that be with nothing."""
        self._links[number] = (gateway, outbox)
        self._meter.attach(number)
        outbox.served(self._report(number))

    def detach(self, number: int) -> None:
        """It ended."""
        self._links.pop(number, None)
        self._meter.detach(number)

    def accepted(self, request_id: str, number: int, submit: pb.Submit, prompt_tokens: int) -> None:
        """A request came."""
        if not submit.tenant_handle:
            return
        self._weights[submit.tenant_handle] = submit.tenant_weight
        cached, generated = submit.expected_cached_tokens, submit.expected_output_tokens
        charge = Charge(self._service, prompt_tokens, cached, generated)
        flow = FlowKey(submit.priority, submit.tenant_handle)
        self._meter.accepted(request_id, number, flow, charge, again=submit.attempt > 1)

    def revoked(self, request_id: str) -> None:
        """The engine did not take it."""
        self._meter.revoked(request_id)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """With its first output."""
        self._meter.cached(request_id, cached_tokens)

    def ended(self, request_id: str, generated_tokens: int) -> None:
        """However it ended."""
        self._meter.generated(request_id, generated_tokens)
        self._meter.ended(request_id)

    def report(self, running: Iterable[tuple[str, int]]) -> None:
        """Tell every gateway what has changed. `running`: requests and the tokens that each has generated."""
        for request_id, generated_tokens in running:
            self._meter.generated(request_id, generated_tokens)
        for number, (_, outbox) in self._links.items():
            if totals := self._report(number):
                outbox.served(totals)

    def relay(self, number: int, backlog: pb.Backlog) -> None:
        """Hand on what a gateway tells of its line."""
        if not backlog.tells_flows or number not in self._links:
            return
        gateway, flows = self._links[number][0], flows_from_pb(backlog.flows)
        for other, outbox in self._links.values():
            if other != gateway:
                outbox.elsewhere(gateway, flows)

    def _report(self, number: int) -> Sequence[WeightedValue[ServedTotal]]:
        return [WeightedValue(total, self._weights.get(total.tenant, 1.0)) for total in self._meter.report(number)]

    def __repr__(self) -> str:
        return f"ServedReports({self._meter})"
