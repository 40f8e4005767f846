"""The part `real_loading` of the scenario. It is like the part `loading`, but with two vLLM replicas instead of four
simulated ones."""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.adapters import loading, rig
from loadtests.agents.servers import ENVIRONMENT
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.serving.ours import ENGINE_READY_S

REAL = loading.ReplicaKind(
    "real ", 2, str, {**rig.ENGINE, "max_loras": 4, "max_cpu_loras": 8}, {**ENVIRONMENT, **rig.THREADS},
    starts_s=ENGINE_READY_S, callers=2,
)  # fmt: skip
ROWS: Mapping[str, Bound | None] = REAL.rows


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part. Raises DidNotStart, TimeoutError."""
    return await loading.play(stage, REAL)
