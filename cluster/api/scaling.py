"""Scaling state of models in the form that operators see, and the interface of the service that changes this state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """A decision to change the number of replicas of a model from `before` to `replicas`, or to keep this number.

    `at_s` is in seconds since the epoch. `numbers` are the values on which the decision was based. `passes`: number of
    consecutive passes of the scaler with an equal decision.
    """

    at_s: float
    before: int
    replicas: int
    action: str
    """up, down, to_zero, from_zero, move (to another type of GPU) or hold."""
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    passes: int = 1


@dataclass(frozen=True, slots=True)
class ModelScaling:
    """Scaling state of one model. `desired`: decided number of replicas. `target`: number requested from Ray.

    `by`: what sets the number of replicas (demand, manual or frozen). `cold_start_s`: 0 if not yet known.
    """

    name: str
    target: int = 0
    running: int = 0
    starting: int = 0
    desired: int = 0
    min_replicas: int = 0
    max_replicas: int = 0
    idle_s: float = 0.0
    by: str = "demand"
    why: str = ""
    cold_start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ScalingExplanation:
    """Scaling state of a model, the decisions that led to that state (newest last), and the numbers of the scaler's
    newest pass."""

    model: ModelScaling
    decisions: Sequence[ScalingDecision] = ()
    now: Mapping[str, float] = field(default_factory=dict)


class ScalingService(Protocol):
    """Service that carries out operators' scaling requests.

    `name` is a model's name or alias. Every method may raise CallError.
    """

    def scale(self, name: str, replicas: int | None) -> ModelScaling:
        """Set a fixed number of replicas. If `replicas` is None, the number follows the demand again."""

    def freeze(self, name: str, frozen: bool) -> Sequence[ModelScaling]:
        """Freeze or unfreeze a model's number of replicas. With `name` "", set or clear a separate flag that freezes
        all models."""

    def explain(self, name: str, limit: int) -> ScalingExplanation:
        """Return why the model has its number of replicas. `limit`: maximum number of decisions; 0: all that are
        stored."""
