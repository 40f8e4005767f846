"""How models stand in scaling, and the desk at which operators ask for it. For what is asked over the link."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """What was decided at `at_s` (since the epoch) and in `passes` passes in a row, with what it was decided on."""

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
    """How one model stands. `by`: what decides: demand, manual or frozen. `cold_start_s` is 0 while unknown."""

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
    """How a model came to stand so: kept decisions, the newest last, and the numbers of the newest pass."""

    model: ModelScaling
    decisions: Sequence[ScalingDecision] = ()
    now: Mapping[str, float] = field(default_factory=dict)


class ScalingService(Protocol):
    """Where operators ask. Names are a model's or its aliases; every verb raises CallError."""

    def scale(self, name: str, replicas: int | None) -> ModelScaling:
        """So many from now on, or by the demand again (None)."""

    def freeze(self, name: str, frozen: bool) -> Sequence[ModelScaling]:
        """Keep the number as it is, or no longer; an empty name is all models, whatever each is by itself."""

    def explain(self, name: str, limit: int) -> ScalingExplanation:
        """Why it has so many; at most `limit` decisions, 0 for all that are kept."""
