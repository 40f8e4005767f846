"""Scaling requests of operators. A request is validated and handed to the scaler, which applies it in its next pass.
After each change, a function that the caller has passed stores all requests. No I/O in this module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.api.scaling import ModelScaling, ScalingExplanation
from cluster.api.types import ModelSpec
from cluster.policy.scaling.inputs import OperatorRequest
from cluster.policy.scaling.scaler import Scaler


class ScalingRequests:
    """Implementation of api.scaling.ScalingService by a Scaler."""

    def __init__(self, scaler: Scaler, changed: Callable[[], None]) -> None:
        """`changed`: called after each change of the requests. It must store the requests and wake the controller, so
        that the scaler applies them."""
        self._scaler = scaler
        self._changed = changed

    def scale(self, name: str, replicas: int | None) -> ModelScaling:
        """Implements `ScalingService.scale`. `replicas` may be below the `min_replicas` of the model's catalog entry,
        but not above its `max_replicas`."""
        spec, asked = self._named(name), self._scaler.operator_requests
        manual = {model: count for model, count in asked.manual.items() if model != spec.name}
        if replicas is not None:
            most = max(spec.max_replicas, spec.min_replicas)
            if not 0 <= replicas <= most:
                raise invalid("replicas", f"must be 0 to {most} (max_replicas of {spec.name}), got {replicas}")
            manual[spec.name] = replicas
        self._ask(dataclasses.replace(asked, manual=manual))
        scaling = self._scaler.scaling_of(spec.name)
        if scaling.by == "frozen":
            return scaling
        return dataclasses.replace(
            scaling,
            desired=scaling.desired if replicas is None else replicas,
            by="demand" if replicas is None else "manual",
        )

    def freeze(self, name: str, frozen: bool) -> Sequence[ModelScaling]:
        """Implements `ScalingService.freeze`."""
        asked = self._scaler.operator_requests
        if name:
            spec = self._named(name)
            models = asked.frozen | {spec.name} if frozen else asked.frozen - {spec.name}
            self._ask(dataclasses.replace(asked, frozen=models))
            names = [spec.name]
        else:
            self._ask(dataclasses.replace(asked, all_frozen=frozen))
            names = list(self._scaler.names)
        now = self._scaler.operator_requests
        return [dataclasses.replace(self._scaler.scaling_of(model), by=now.decided_by(model)) for model in names]

    def explain(self, name: str, limit: int) -> ScalingExplanation:
        """Implements `ScalingService.explain`."""
        return self._scaler.explain(self._named(name).name, limit)

    def _named(self, name: str) -> ModelSpec:
        spec = self._scaler.find(name)
        if spec is None:
            raise CallError(Outcome.MODEL_NOT_FOUND, f"model {name[:128]!r} is not in the catalog")
        return spec

    def _ask(self, asked: OperatorRequest) -> None:
        if asked != self._scaler.operator_requests:
            self._scaler.set_operator_requests(asked)
            self._changed()


def requests_to_json(asked: OperatorRequest) -> dict[str, object]:
    """Return the requests as plain JSON values; `requests_from_json` is the inverse."""
    return {"manual": dict(asked.manual), "frozen": sorted(asked.frozen), "all_frozen": asked.all_frozen}


def requests_from_json(values: Mapping[str, object]) -> OperatorRequest:
    """Return an OperatorRequest from JSON values; the inverse of `requests_to_json`. Raises ValueError for invalid
    values."""
    manual, frozen, everything = values.get("manual"), values.get("frozen"), values.get("all_frozen")
    if not isinstance(manual, dict) or not all(isinstance(count, int) for count in manual.values()):
        raise ValueError("manual must be numbers by model")
    if not isinstance(frozen, list) or not isinstance(everything, bool):
        raise ValueError("frozen must be a list, all_frozen a boolean")
    return OperatorRequest(
        {str(model): int(count) for model, count in manual.items()}, frozenset(map(str, frozen)), everything
    )
