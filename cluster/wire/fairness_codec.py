"""The frames of link.v1 about whose turn it is, and the types of tenancy; beside codec.py, which knows the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Generic, NamedTuple, TypeVar

from cluster.link.v1 import link_pb2 as pb
from cluster.policy.fairness.order import Waiting
from cluster.policy.fairness.peer_backlog import Backlog, ServedTotal
from cluster.policy.fairness.service_counters import FlowKey

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WeightedValue(Generic[T]):
    """Something of one tenant, and the tenant's weight, which its reader may not know."""

    what: T
    weight: float


class FlowBacklog(NamedTuple):
    """What waits of one tenant in one class."""

    flow: FlowKey
    backlog: Backlog


def put_turn(message: pb.Submit, turn: WeightedValue[Waiting]) -> None:
    """Say whose turn it was, and what it was charged; the class's rank is the request's priority already."""
    waiting = turn.what
    message.tenant_handle, message.tenant_weight = waiting.tenant, turn.weight
    message.expected_cached_tokens, message.expected_output_tokens = waiting.cached_tokens, waiting.output_tokens


def backlog_to_pb(
    waiting: int, tokens: int, claim: int, kept: int, flows: Sequence[WeightedValue[FlowBacklog]] | None
) -> pb.Backlog:
    """What waits at a gateway, and of its claim what this worker has computed; `flows` None where another worker is
    told of them."""
    return pb.Backlog(
        waiting=waiting,
        waiting_tokens=tokens,
        claim=claim,
        kept=kept,
        flows=_flows(flows or ()),
        tells_flows=flows is not None,
    )


def _flows(flows: Iterable[WeightedValue[FlowBacklog]]) -> Iterator[pb.FlowBacklog]:
    for one in flows:
        (rank, tenant), (requests, service) = one.what
        yield pb.FlowBacklog(
            rank=rank, tenant_handle=tenant, requests=requests, service=max(service, 0.0), weight=one.weight
        )


def flows_from_pb(flows: Iterable[pb.FlowBacklog]) -> list[WeightedValue[FlowBacklog]]:
    """Who waits."""
    return [
        WeightedValue(
            FlowBacklog(FlowKey(m.rank, m.tenant_handle), Backlog(m.requests, _amount(m.service))), _weight(m.weight)
        )
        for m in flows
    ]


def elsewhere_to_pb(waiting: Mapping[str, Sequence[WeightedValue[FlowBacklog]]]) -> Iterator[pb.Elsewhere]:
    """By gateway."""
    return (pb.Elsewhere(gateway=gateway, flows=_flows(flows)) for gateway, flows in waiting.items())


def elsewhere_from_pb(messages: Iterable[pb.Elsewhere]) -> Iterator[tuple[str, list[WeightedValue[FlowBacklog]]]]:
    """The inverse of elsewhere_to_pb."""
    return ((m.gateway, flows_from_pb(m.flows)) for m in messages)


def served_to_pb(totals: Iterable[WeightedValue[ServedTotal]]) -> pb.Served:
    """A worker's report."""
    return pb.Served(
        flows=[
            pb.ServedFlow(
                rank=one.what.rank,
                tenant_handle=one.what.tenant,
                total=one.what.total,
                by_this_link=one.what.by_this_link,
                weight=one.weight,
            )
            for one in totals
        ]
    )


def served_from_pb(m: pb.Served) -> list[WeightedValue[ServedTotal]]:
    """The inverse of served_to_pb."""
    return [
        WeightedValue(
            ServedTotal(f.rank, f.tenant_handle, _amount(f.total), _amount(f.by_this_link)), _weight(f.weight)
        )
        for f in m.flows
    ]


def _weight(weight: float) -> float:
    """Above 0 and no more than a number can carry on with; 1 for what is no weight."""
    return weight if 0 < weight < float("inf") else 1.0


def _amount(value: float) -> float:
    """Weighted tokens. Raises ValueError for what is no number: it would spoil every account that it is added to."""
    if not isfinite(value):
        raise ValueError(f"{value} is no amount of weighted tokens")
    return value
