"""Routing by cached prefix, over simulated workers in virtual time and over two vLLM workers.

The parts replay traces and agents' sessions, and compare the cache index with other projects' indexes.

Scheduling policy, waiting room, router, fair queue, cache index, prefix hashes, credit and admission window are the
production code. KV events arrive late, and some batches are lost and sent again.

Options: `--only PART` runs some of the parts. `--adapters SHARE` sets the fraction of the calls that name one of 64
adapters, in the parts `mooncake`, `agents` and `azure`.
"""

from __future__ import annotations

from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import play_parts

PARTS = ("mooncake", "agents", "azure", "burst", "slow", "gateways", "new_gateway", "index", "engines")
"""Names of the modules of loadtests/routing that are parts."""


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of all parts in the order of PARTS."""
    await play_parts(stage, "loadtests.routing", PARTS)
