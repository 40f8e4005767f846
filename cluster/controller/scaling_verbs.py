"""Controller side of the admin verbs about scaling: adapts cluster.admin.v1 messages to ScalingService."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.admin.v1 import scaling_pb2 as pb
from cluster.api.outcomes import invalid
from cluster.api.scaling import ModelScaling, ScalingDecision, ScalingService
from cluster.wire.admin_forwarding import Verb, verb


def scaling_verbs(service: ScalingService) -> Mapping[str, Verb]:
    """Return the handlers of the scaling verbs by name."""

    async def scale(request: pb.ScaleRequest, actor: str) -> pb.ScaleResponse:
        to = request.WhichOneof("to")
        if to is None or (to == "auto" and not request.auto):
            raise invalid("replicas", "say how many, or auto: true")
        return pb.ScaleResponse(model=_model(service.scale(request.name, None if to == "auto" else request.replicas)))

    async def freeze(request: pb.FreezeRequest, actor: str) -> pb.FreezeResponse:
        return pb.FreezeResponse(models=[_model(model) for model in service.freeze(request.name, True)])

    async def unfreeze(request: pb.UnfreezeRequest, actor: str) -> pb.UnfreezeResponse:
        return pb.UnfreezeResponse(models=[_model(model) for model in service.freeze(request.name, False)])

    async def explain(request: pb.ExplainScalingRequest, actor: str) -> pb.ExplainScalingResponse:
        if request.limit < 0:
            raise invalid("limit", f"must not be negative, got {request.limit}")
        explanation = service.explain(request.name, request.limit)
        return pb.ExplainScalingResponse(
            model=_model(explanation.model),
            decisions=[_decision(decision) for decision in explanation.decisions],
            now=dict(explanation.now),
        )

    return {
        "Catalog.Scale": verb(pb.ScaleRequest, scale),
        "Catalog.Freeze": verb(pb.FreezeRequest, freeze),
        "Catalog.Unfreeze": verb(pb.UnfreezeRequest, unfreeze),
        "Fleet.ExplainScaling": verb(pb.ExplainScalingRequest, explain),
    }


def _model(model: ModelScaling) -> pb.ModelScaling:
    return pb.ModelScaling(
        name=model.name,
        target=model.target,
        running=model.running,
        starting=model.starting,
        desired=model.desired,
        min_replicas=model.min_replicas,
        max_replicas=model.max_replicas,
        idle_s=model.idle_s,
        by=model.by,
        why=model.why,
        cold_start_s=model.cold_start_s,
    )


def _decision(decision: ScalingDecision) -> pb.ScalingDecision:
    return pb.ScalingDecision(
        at_s=decision.at_s,
        replicas_before=decision.before,
        replicas=decision.replicas,
        action=decision.action,
        why=decision.why,
        numbers=dict(decision.numbers),
        passes=decision.passes,
    )
