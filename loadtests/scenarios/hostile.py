"""Measures how attacks and routine procedures affect callers who have no part in them. Attackers are anonymous clients
and tenants. A procedure is, for example, the renewal of certificates. `--only PART` runs some of the parts."""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS: tuple[str, ...] = (
    *("streams", "memory", "http_memory", "floods", "idle", "refusals", "cost", "renewal", "sigterm", "configs"),
    "links",
)
"""Names of the modules of loadtests/hostile."""


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of all parts in the table's order."""
    await play_parts(stage, "loadtests.hostile", PARTS)
