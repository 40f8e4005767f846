"""Adapters: embedding models and adapters, compared with vLLM's own server. `--only PART` runs some of the parts."""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS = ("rows", "embeddings", "mixed", "cold", "loading", "real_loading", "hostile")
"""Names of the modules of loadtests/adapters that are parts."""


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of all parts in the table's order."""
    await play_parts(stage, "loadtests.adapters", PARTS)
