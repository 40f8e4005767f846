"""Scaling policy: decides how many replicas each model should have. Pure: the inputs are observations, the memory of
the policy, and the time.

    decisions, memory = decide(observation, memory, now_s)

The memory of a new policy is `Memory()`. A restarted controller begins with it and decides from what it observes.
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
