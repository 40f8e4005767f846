"""Conversion of the types for fair queues and tenants between cluster.policy and link.v1. codec.py converts the types
of cluster.api.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from cluster.api.frozen import frozen_dataclass
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.peer_backlog import Backlog, ServedTotal
from cluster.policy.fairness.service_counters import FlowKey
from cluster.policy.tenants.policy import MAX_WEIGHT, MIN_WEIGHT

T = TypeVar("T")
MAX_NAME = 255
"""Maximum number of characters that are kept of a gateway's name."""
MAX_BACKLOG_FLOWS = 4096
"""Maximum number of flows that are read of one gateway's backlog, which takes about ten milliseconds."""
MAX_HANDLE = 64
"""Maximum number of characters of a tenant's handle."""
MAX_SERVICE = 2.0**53
"""Largest number of weighted tokens in a report."""


@frozen_dataclass
class WeightedValue(Generic[T]):
    """A value that belongs to one tenant, with the tenant's weight, because the receiver may not know the weight."""

    value: T
    weight: float


class FlowBacklog(NamedTuple):
    """The backlog (waiting sequences) of one tenant in one priority class."""

    flow: FlowKey
    backlog: Backlog


def add_charge(message: pb.Submit, turn: WeightedValue[WaitingSequence]) -> None:
    """Set the fields of a Submit that say how its tenant is charged.

    The fields are the tenant, the tenant's weight, and the expected numbers of cached and generated tokens. `turn`: the
    waiting sequence with the tenant's weight.
    """
    waiting = turn.value
    message.tenant_handle, message.tenant_weight = waiting.tenant, turn.weight
    message.expected_cached_tokens, message.expected_output_tokens = waiting.cached_tokens, waiting.output_tokens


def backlog_to_pb(
    waiting: int, tokens: int, claim: int, kept: int, flows: Sequence[WeightedValue[FlowBacklog]] | None
) -> pb.Backlog:
    """Encode a gateway's backlog of `waiting` sequences with `tokens` tokens. `claim`: the gateway's share of the
    sequences that are served next. `kept`: number of waiting sequences whose KV blocks are on this worker. `flows`: the
    backlogs of the tenants; None: those in the last message stay valid."""
    return pb.Backlog(
        waiting=waiting,
        waiting_tokens=tokens,
        claim=claim,
        kept=kept,
        flows=_flows(flows or ()),
        tells_flows=flows is not None,
    )


def _flows(flows: Iterable[WeightedValue[FlowBacklog]]) -> Iterator[pb.FlowBacklog]:
    for weighted in flows:
        (rank, tenant), (requests, service) = weighted.value
        yield pb.FlowBacklog(
            rank=rank, tenant_handle=tenant, requests=requests, service=max(service, 0.0), weight=weighted.weight
        )


def flows_from_pb(flows: Iterable[pb.FlowBacklog]) -> list[WeightedValue[FlowBacklog]]:
    """Decode the backlogs of tenants."""
    return [
        WeightedValue(
            FlowBacklog(FlowKey(m.rank, _handle(m.tenant_handle)), Backlog(m.requests, _amount(m.service))),
            _weight(m.weight),
        )
        for m in flows
    ]


def peer_backlogs_to_pb(waiting: Mapping[str, Sequence[WeightedValue[FlowBacklog]]]) -> Iterator[pb.Elsewhere]:
    """Encode the backlogs of other gateways. `waiting`: by gateway, the backlogs of its tenants."""
    return (pb.Elsewhere(gateway=gateway, flows=_flows(flows)) for gateway, flows in waiting.items())


def peer_backlogs_from_pb(messages: Iterable[pb.Elsewhere]) -> Iterator[tuple[str, list[WeightedValue[FlowBacklog]]]]:
    """Decode the backlogs of other gateways, the inverse of `peer_backlogs_to_pb`."""
    return ((m.gateway[:MAX_NAME], flows_from_pb(m.flows[:MAX_BACKLOG_FLOWS])) for m in messages)


def served_to_pb(totals: Iterable[WeightedValue[ServedTotal]]) -> pb.Served:
    """Encode a worker's totals of served tokens."""
    return pb.Served(
        flows=[
            pb.ServedFlow(
                rank=weighted.value.rank,
                tenant_handle=weighted.value.tenant,
                total=weighted.value.total,
                by_this_link=weighted.value.by_this_link,
                weight=weighted.weight,
            )
            for weighted in totals
        ]
    )


def served_from_pb(flows: Iterable[pb.ServedFlow]) -> list[WeightedValue[ServedTotal]]:
    """Decode a worker's totals of served tokens, the inverse of `served_to_pb`."""
    return [
        WeightedValue(
            ServedTotal(f.rank, _handle(f.tenant_handle), _amount(f.total), _amount(f.by_this_link)), _weight(f.weight)
        )
        for f in flows
    ]


def _handle(handle: str) -> str:
    if len(handle) > MAX_HANDLE:
        raise ValueError(f"tenant_handle: {len(handle)} characters, at most {MAX_HANDLE} are allowed")
    return handle


def _weight(weight: float) -> float:
    """Return a valid weight: `weight` if a tenant may have it, else 1."""
    return weight if MIN_WEIGHT <= weight <= MAX_WEIGHT else 1.0


def _amount(value: float) -> float:
    """Return `value`, a number of weighted tokens. Raises ValueError if it is NaN or if its absolute value is larger
    than any sum that is counted exactly: it would spoil every sum."""
    if not abs(value) <= MAX_SERVICE:
        raise ValueError(f"weighted tokens must lie between {-MAX_SERVICE:g} and {MAX_SERVICE:g}, got {value}")
    return value
