"""Attacks by anonymous clients, tenants and routine procedures, and their effect on everyone else.

Parts, each a module of loadtests/hostile with its rows, in the order of the table. `--only PART` runs some of them.
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
"""Modules of loadtests/hostile."""
NOT_ASKED = "not selected (--only)"


class Part(Protocol):
    """A module of loadtests/hostile."""

    ROWS: Mapping[str, Bound]
    """The part's rows with their bounds."""
    measure: Callable[[Stage], Awaitable[list[Figure]]]
    """Run the attack; one figure a row. Raises RuntimeError, DidNotStart, TimeoutError."""


def exact(name: str, value: float, bound: Bound, unit: str, note: str = "") -> Figure:
    """A row that is counted or measured once: met when the value is inside its bound."""
    met = value >= bound.limit if bound.sense == ">=" else value <= bound.limit
    return Figure(name, value=value, bound=str(bound), met=met, unit=unit, note=note)


async def play(stage: Stage) -> None:
    """Run the selected parts, and report their rows in the table's order."""
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
