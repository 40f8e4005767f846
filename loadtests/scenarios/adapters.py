"""Adapters: embedding models and adapters, compared with vLLM's own server. `--only PART` runs some of the parts."""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS = ("rows", "embeddings", "mixed", "cold", "loading", "real_loading", "hostile")
"""Names of the modules of loadtests/adapters that are parts."""


async def play(stage: Stage) -> None:
    """Run the parts of this scenario that the user selected. Report the rows of all parts, also of those that did not
    run. The rows are in the order of PARTS."""
    await play_parts(stage, "loadtests.adapters", PARTS)
