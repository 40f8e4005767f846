"""A worker's reports to gateways for fair queueing: the tokens that the worker has served each tenant, and the other
gateways' backlogs.

Gateways have no connections to each other, but a worker is linked to many gateways. So the worker forwards the backlog
of each of these gateways (its waiting sequences) to the others. It also reports to all of them the tokens that it has
served each tenant. No work is done per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.peer_backlog import ServedTotal
from cluster.policy.fairness.served_tokens import ServedMeter
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.fairness.token_cost import Charge, ServiceWeights
from cluster.wire.codecs.fairness_codec import WeightedValue, flows_from_pb
from cluster.wire.outbox import Outbox


class ServedReports:
    """Sends one worker's reports to the gateways: the tokens served to each tenant, and the other gateways' backlogs.
    Links are identified by their numbers."""

    def __init__(self) -> None:
        self._meter = ServedMeter()
        self._service = ServiceWeights()
        self._weights: dict[str, float] = {}
        self._links: dict[int, tuple[str, Outbox]] = {}

    def attach(self, number: int, gateway: str, outbox: Outbox) -> None:
        """Add a link, and send the current totals to its gateway at once. An empty list is sent, too."""
        self._links[number] = (gateway, outbox)
        self._meter.attach(number)
        outbox.served(self._report(number))

    def detach(self, number: int) -> None:
        """Remove a link."""
        self._links.pop(number, None)
        self._meter.detach(number)

    def accepted(self, request_id: str, number: int, submit: pb.Submit, prompt_tokens: int) -> None:
        """Record a request that the worker has received."""
        if not submit.tenant_handle:
            return
        self._weights[submit.tenant_handle] = submit.tenant_weight
        cached, generated = submit.expected_cached_tokens, submit.expected_output_tokens
        charge = Charge(self._service, prompt_tokens, cached, generated)
        flow = FlowKey(submit.priority, submit.tenant_handle)
        self._meter.accepted(request_id, number, flow, charge, again=submit.attempt > 1)

    def revoked(self, request_id: str) -> None:
        """Remove a request that the engine did not accept."""
        self._meter.revoked(request_id)

    def cached(self, request_id: str, cached_tokens: int) -> None:
        """Record how many tokens of a request's prompt were cached, as reported with the first output."""
        self._meter.cached(request_id, cached_tokens)

    def ended(self, request_id: str, generated_tokens: int) -> None:
        """Record that a request has ended, whatever the reason."""
        self._meter.generated(request_id, generated_tokens)
        self._meter.ended(request_id)

    def report(self, running: Iterable[tuple[str, int]]) -> None:
        """Send each gateway the totals that have changed since the last report to that gateway.

        `running`: the running requests, each with its id and the number of tokens generated so far.
        """
        for request_id, generated_tokens in running:
            self._meter.generated(request_id, generated_tokens)
        for number, (_, outbox) in self._links.items():
            if totals := self._report(number):
                outbox.served(totals)

    def forward_backlog(self, number: int, backlog: pb.Backlog) -> None:
        """Forward a gateway's report of its waiting sequences to the other gateways. `number`: number of the gateway's
        link."""
        if not backlog.tells_flows or number not in self._links:
            return
        gateway, flows = self._links[number][0], flows_from_pb(backlog.flows)
        for other, outbox in self._links.values():
            if other != gateway:
                outbox.peer_backlog(gateway, flows)

    def _report(self, number: int) -> Sequence[WeightedValue[ServedTotal]]:
        return [WeightedValue(total, self._weights.get(total.tenant, 1.0)) for total in self._meter.report(number)]
