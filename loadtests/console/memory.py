"""The part `memory`: memory of one hour of the console's history, with 1,000 tenants and 100 models, in a separate
process.

python -m loadtests.console.memory

The program fills the history of a gateway process: each series gets a value at every step of an hour. The program
prints the growth of its resident memory and the size of the arrays, in bytes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Mapping

import psutil

from cluster.gateway.console.history import history as histories
from cluster.gateway.console.overview.parts import STEP_S
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

TENANTS, MODELS = 1000, 100
RUN_S = 300.0
MIB = 1 << 20
ROW = f"memory of the hour of history, {TENANTS:,} tenants and {MODELS} models"
ROWS: Mapping[str, Bound | None] = {ROW: Bound("<=", 64.0)}


async def measure(stage: Stage) -> list[Figure]:
    """Run the program, and return the report's row. Raises RuntimeError, TimeoutError."""
    stage.screen.say("an hour of history is filled")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtests.console.memory", stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(RUN_S):
        out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"the program ended with {process.returncode}")
    grown = json.loads(out)
    note = f"arrays {grown['arrays'] / MIB:.1f} MiB; {grown['steps']} steps of {STEP_S:g} s"
    return [exact(ROW, grown["resident"] / MIB, ROWS[ROW], "MiB", note)]


def fill(tenant_count: int = TENANTS, model_count: int = MODELS) -> dict[str, int]:
    """Fill a history, and return the growth of the process's memory and the size of the history's arrays, in bytes."""
    tenants = [f"tenant-{at:04}" for at in range(tenant_count)]
    models = [f"model-{at:03}" for at in range(model_count)]
    gc.collect()
    before = psutil.Process().memory_info().rss
    history = histories.History()
    for step in range(histories.STEPS):
        for name in tenants:
            history.tenants.put(name, step, [float(step)] * len(histories.TENANT_COLUMNS))
        for name in models:
            history.models.put(name, step, [float(step)] * len(histories.MODEL_COLUMNS))
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    return {"resident": grown, "arrays": history.nbytes, "steps": histories.STEPS}


if __name__ == "__main__":
    print(json.dumps(fill()))
