"""The scaling verbs of cluster.admin.v1 as the controller answers them: messages in, the desk's words, messages out."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.admin.v1 import scaling_pb2 as pb
from cluster.api.outcomes import invalid
from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingService
from cluster.wire.admin_forwarding import Verb, verb


def scaling_verbs(desk: ScalingService) -> Mapping[str, Verb]:
    """By their names."""

    async def scale(request: pb.ScaleRequest, actor: str) -> pb.ScaleResponse:
        to = request.WhichOneof("to")
        if to is None or (to == "auto" and not request.auto):
            raise invalid("replicas", "say how many, or auto: true")
        return pb.ScaleResponse(model=_model(desk.scale(request.name, None if to == "auto" else request.replicas)))

    async def freeze(request: pb.FreezeRequest, actor: str) -> pb.FreezeResponse:
        return pb.FreezeResponse(models=[_model(one) for one in desk.freeze(request.name, True)])

    async def unfreeze(request: pb.UnfreezeRequest, actor: str) -> pb.UnfreezeResponse:
        return pb.UnfreezeResponse(models=[_model(one) for one in desk.freeze(request.name, False)])

    async def explain(request: pb.ExplainScalingRequest, actor: str) -> pb.ExplainScalingResponse:
        if request.limit < 0:
            raise invalid("limit", f"must not be negative, got {request.limit}")
        story = desk.explain(request.name, request.limit)
        decisions = [_decision(one) for one in story.decisions]
        return pb.ExplainScalingResponse(model=_model(story.model), decisions=decisions, now=dict(story.now))

    return {
        "Catalog.Scale": verb(pb.ScaleRequest, scale),
        "Catalog.Freeze": verb(pb.FreezeRequest, freeze),
        "Catalog.Unfreeze": verb(pb.UnfreezeRequest, unfreeze),
        "Fleet.ExplainScaling": verb(pb.ExplainScalingRequest, explain),
    }


def _model(one: ModelScaling) -> pb.ModelScaling:
    return pb.ModelScaling(
        name=one.name,
        target=one.target,
        running=one.running,
        starting=one.starting,
        desired=one.desired,
        min_replicas=one.min_replicas,
        max_replicas=one.max_replicas,
        idle_s=one.idle_s,
        by=one.by,
        why=one.why,
        cold_start_s=one.cold_start_s,
    )


def _decision(one: ScalingDecision) -> pb.ScalingDecision:
    return pb.ScalingDecision(
        at_s=one.at_s,
        replicas_before=one.before,
        replicas=one.replicas,
        action=one.action,
        why=one.why,
        numbers=dict(one.numbers),
        passes=one.passes,
    )
