"""Attacks by anonymous clients, tenants and routine procedures, and the effect on all other callers.

Each part is a module of loadtests/hostile with rows of its own, in the order of the table. `--only PART` runs some of
the parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, cast

from loadtests.children import DidNotStart
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage

PARTS: tuple[str, ...] = (
    *("streams", "memory", "http_memory", "floods", "idle", "refusals", "cost", "renewal", "sigterm", "configs"),
    "links",
)
"""Names of the modules of loadtests/hostile."""
NOT_ASKED = "not selected (--only)"


class Part(Protocol):
    """Protocol that every module of loadtests/hostile implements."""

    ROWS: Mapping[str, Bound]
    """Rows of the part, with the bound of each row."""
    measure: Callable[[Stage], Awaitable[list[Figure]]]
    """Function that runs the attack and returns one figure for each row. Raises RuntimeError, DidNotStart,
    TimeoutError.
    """


def exact(name: str, value: float, bound: Bound, unit: str, note: str = "") -> Figure:
    """Return a row that is counted or measured once. The row is met when the value is inside the bound."""
    met = value >= bound.limit if bound.sense == ">=" else value <= bound.limit
    return Figure(name, value=value, bound=str(bound), met=met, unit=unit, note=note)


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of the parts in the table's order."""
    for name in PARTS:
        part = cast(Part, importlib.import_module(f"loadtests.hostile.{name}"))
        if not stage.options.selects(name):
            stage.report.figures += [missing(row, bound, NOT_ASKED) for row, bound in part.ROWS.items()]
            continue
        stage.screen.say(f"part {name}")
        try:
            stage.report.figures += await part.measure(stage)
        except (RuntimeError, DidNotStart, TimeoutError) as error:
            stage.report.problems.append(f"{name}: {error!r}")
            stage.report.figures += [missing(row, bound, f"part {name} failed") for row, bound in part.ROWS.items()]
