"""How many replicas each model is to have: pure, from what is seen, what is remembered, and the time.

    decisions, memory = decide(observation, memory, now_s)

An empty `Memory()` will do: a controller that comes back decides from what it sees.
"""

from cluster.control.scaling.memory import Memory, ModelMemory
from cluster.control.scaling.policy import decide
from cluster.control.scaling.types import (
    ClassDemand,
    Decision,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaSeen,
    ReplicaState,
    Slo,
)

__all__ = [
    "ClassDemand",
    "Decision",
    "Memory",
    "ModelMemory",
    "ModelSeen",
    "ModelSettings",
    "Observation",
    "Rates",
    "ReplicaSeen",
    "ReplicaState",
    "Slo",
    "decide",
]
