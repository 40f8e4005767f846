"""Test that each request in a batch gets its own adapter while all adapter slots of the engine are full.

It runs as the part `rows`. A batch of vLLM's engine with eight slots has requests for the base model and for eight
adapters, on one rank and on two. The same requests are then computed again, each resumed after its first tokens.
`--runner v2` selects vLLM's V2 model runner, whose kernels are interpreted.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

from loadtests import interpreted
from loadtests.adapters import rig
from loadtests.agents.servers import ENVIRONMENT
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

RANKS = (1, 2)
NONE = Bound("<=", 0.0)
WAIT_S = 1500.0
ROWS_IN_BATCH = 10


def titles(ranks: int) -> tuple[str, str]:
    """Return the names of the report's two rows for an engine with `ranks` ranks."""
    engine = f"{ranks} rank{'s' if ranks > 1 else ''}"
    return (
        f"base model and 8 adapters in one batch, {engine}: sequences that differ from merged weights",
        f"the same, cut and resumed, {engine}: sequences that differ from merged weights",
    )


ROWS: Mapping[str, Bound | None] = {title: NONE for ranks in RANKS for title in titles(ranks)}


async def measure(stage: Stage) -> list[Figure]:
    """Run the engines one after the other and return the report's rows. Raises DidNotStart, RuntimeError."""
    folder = await rig.prepare(stage, 1)
    figures: list[Figure] = []
    for ranks in RANKS:
        counts = await _counts(stage, str(folder / "model"), ranks)
        if counts["together"] < ROWS_IN_BATCH:
            raise RuntimeError(f"only {counts['together']} of {ROWS_IN_BATCH} rows were computed in one step")
        runner = stage.options.runner
        if counts["engine_class"].endswith("-v2") != (runner == "v2"):
            raise RuntimeError(f"the engine {counts['engine_class']} does not run the model runner {runner}")
        whole, resumed = titles(ranks)
        figures.append(exact(whole, counts["differ"], NONE, note=f"of {counts['rows']}, {runner}"))
        figures.append(exact(resumed, counts["resumed_differ"], NONE, note=f"of {counts['resumed']}, {runner}"))
    return figures


async def _counts(stage: Stage, model: str, ranks: int) -> dict[str, Any]:
    """Run the program `engine_rows` on an engine with `ranks` ranks, and return the counts that the program writes.
    Raises DidNotStart."""
    folder = stage.folder / f"rows-{ranks}"
    out = stage.folder / f"rows-{ranks}.json"
    command = [sys.executable, "-m", "loadtests.adapters.engine_rows", model, str(folder), str(ranks), str(out)]
    v2 = interpreted.environment() if stage.options.runner == "v2" else {}
    child = stage.children.start(f"rows-{ranks}", serving.WORKER, command, {**ENVIRONMENT, **rig.THREADS, **v2})

    async def written() -> bool:
        return await asyncio.to_thread(out.exists)

    await child.until(written, "the rows are compared", WAIT_S)
    await child.stop()
    counts: dict[str, Any] = json.loads(out.read_text())
    return counts
