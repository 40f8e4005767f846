"""What the policy remembers between two rounds: a small frozen value that nobody else needs to understand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Of one model."""

    last_call_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all models. `at_s`: of the last observation; None in an empty memory."""

    at_s: float | None = None
    models: Mapping[str, ModelMemory] = field(default_factory=dict)
