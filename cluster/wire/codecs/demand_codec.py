"""Conversion between cluster.api and link.v1 of what gateways and the controller report to each other: demand, the work
that engines have computed, and problems.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from cluster.api.demand import ClassCounts, ComputedWork, ModelDemand
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.problems import MAX_PROBLEMS, Finding, Problem
from cluster.wire.codecs.numbers import MAX_TOTAL_S, bounded


def demand_to_pb(demand: Iterable[ModelDemand], counting_s: float) -> pb.Demand:
    """Encode a gateway's demand report. `counting_s`: the length in seconds of the period that the report covers."""
    models = [
        pb.ModelDemand(
            model=d.model,
            waiting=d.waiting,
            waiting_tokens=d.waiting_tokens,
            running=d.running,
            arrived=d.arrived,
            arrived_tokens=d.arrived_tokens,
            classes=[_class_to_pb(c) for c in d.classes],
        )
        for d in demand
    ]
    return pb.Demand(models=models, counting_s=counting_s)


def demand_from_pb(demand: pb.Demand) -> Sequence[ModelDemand]:
    """Decode a gateway's demand report, the inverse of `demand_to_pb`. The length of the period is not decoded."""
    return [
        ModelDemand(
            d.model,
            d.waiting,
            d.waiting_tokens,
            d.running,
            d.arrived,
            d.arrived_tokens,
            tuple(_class_from_pb(c) for c in d.classes),
        )
        for d in demand.models
    ]


def _class_to_pb(c: ClassCounts) -> pb.ClassDemand:
    return pb.ClassDemand(
        priority_class=c.priority_class,
        rank=c.rank,
        arrived_requests=c.arrived_requests,
        arrived_prompt_tokens=c.arrived_prompt_tokens,
        expected_output_tokens=c.expected_output_tokens,
        within_slo=c.within_slo,
        outside_slo=c.outside_slo,
        queued_requests=c.queued_requests,
        queued_tokens=c.queued_tokens,
        oldest_wait_s=c.oldest_wait_s,
        nearest_deadline_s=c.nearest_deadline_s,
        held_requests=c.held_requests,
    )


def _class_from_pb(c: pb.ClassDemand) -> ClassCounts:
    return ClassCounts(
        priority_class=c.priority_class,
        rank=c.rank,
        arrived_requests=c.arrived_requests,
        arrived_prompt_tokens=c.arrived_prompt_tokens,
        expected_output_tokens=c.expected_output_tokens,
        within_slo=c.within_slo,
        outside_slo=c.outside_slo,
        queued_requests=c.queued_requests,
        queued_tokens=c.queued_tokens,
        oldest_wait_s=c.oldest_wait_s,
        nearest_deadline_s=c.nearest_deadline_s if c.HasField("nearest_deadline_s") else None,
        held_requests=c.held_requests,
    )


def work_to_pb(work: ComputedWork) -> pb.Work:
    """Encode the work that an engine has done."""
    return pb.Work(
        steps=work.steps,
        busy_s=work.busy_s,
        prefill_tokens=work.prefill_tokens,
        decode_tokens=work.decode_tokens,
        preemptions=work.preemptions,
        prefix_query_tokens=work.prefix_query_tokens,
        prefix_hit_tokens=work.prefix_hit_tokens,
    )


def work_from_pb(work: pb.Work) -> ComputedWork:
    """Decode the work that an engine has done, the inverse of `work_to_pb`."""
    return ComputedWork(
        work.steps,
        bounded(work.busy_s, MAX_TOTAL_S),
        work.prefill_tokens,
        work.decode_tokens,
        work.preemptions,
        work.prefix_query_tokens,
        work.prefix_hit_tokens,
    )


def problems_to_pb(problems: Sequence[Problem]) -> Iterable[pb.Problem]:
    """Encode problems."""
    return [pb.Problem(kind=p.kind, object=p.object, cause=p.cause, since_s=p.since_s) for p in problems]


def problems_from_pb(messages: Sequence[pb.Problem]) -> Sequence[Problem]:
    """Decode problems, at most MAX_PROBLEMS, each text cut to its bound."""
    return [
        Problem.of(Finding(message.kind, message.object, message.cause), message.since_s)
        for message in messages[:MAX_PROBLEMS]
        if math.isfinite(message.since_s)
    ]
