"""The scenario `agents`: tool calls, reasoning and long conversations, compared with vLLM's own server, and tests of
real clients. `--only PART` runs some of the parts."""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS = ("bfcl", "forced", "strict", "turns", "tool_tokens", "served_turns", "clients")
"""Names of the modules of loadtests/agents that are parts."""


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of all parts in the table's order."""
    await play_parts(stage, "loadtests.agents", PARTS)
