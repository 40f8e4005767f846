"""How many replicas each model is to have: pure, from what is seen, what is remembered, and the time.

    decisions, memory = decide(observation, memory, now_s)

An empty `Memory()` will do: a controller that comes back decides from what it sees.
"""

from cluster.policy.scaling.portfolio.memory import Memory, ModelMemory
from cluster.policy.scaling.portfolio.policy import decide
from cluster.policy.scaling.portfolio.types import (
    ClassDemand,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaDecision,
    ReplicaSeen,
    ReplicaState,
    Slo,
)

__all__ = [
    "ClassDemand",
    "Memory",
    "ModelMemory",
    "ModelSeen",
    "ModelSettings",
    "Observation",
    "Rates",
    "ReplicaDecision",
    "ReplicaSeen",
    "ReplicaState",
    "Slo",
    "decide",
]
