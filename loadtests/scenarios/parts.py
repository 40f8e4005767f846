"""Scenarios that consist of parts. Each part is a module in a package of the scenario, and measures some rows of the
scenario's report.

`--only PART` selects the parts to run. The report has the rows of all parts, in the order in which the scenario lists
its parts. The rows of a part that is not selected have no value.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, cast

from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage

NOT_ASKED = "not selected (--only)"


class Part(Protocol):
    """Interface of a module that defines one part of a scenario: the rows of the part, and the function that measures
    them."""

    ROWS: Mapping[str, Bound | None]
    """Rows of the part, with the bound of each row; None for a row without a bound."""
    measure: Callable[[Stage], Awaitable[list[Figure]]]
    """Function that returns one figure for each row. If the function raises an error, the report names the error."""


def exact(name: str, value: float, bound: Bound | None, unit: str = "", note: str = "") -> Figure:
    """Return a row whose value was counted or measured once. If the row has a bound, it is met when the value is inside
    the bound."""
    met = None if bound is None else value >= bound.limit if bound.sense == ">=" else value <= bound.limit
    return Figure(name, value=value, bound=str(bound) if bound else None, met=met, unit=unit, note=note)


async def play_parts(stage: Stage, package: str, names: Sequence[str]) -> None:
    """Run the selected parts, and report the rows of all parts. `package`: the package of the parts' modules.

    Each part has its own folder, so that it does not use tenants or files of another part. The child processes of a
    part are stopped when the part ends. If a part fails, the other parts still run.
    """
    for name in names:
        part = cast(Part, importlib.import_module(f"{package}.{name}"))
        if not stage.options.selects(name):
            stage.report.figures += [missing(row, bound, NOT_ASKED) for row, bound in part.ROWS.items()]
            continue
        stage.screen.say(f"part {name}")
        folder = stage.folder / name
        folder.mkdir()
        try:
            stage.report.figures += await part.measure(replace(stage, folder=folder))
        except Exception as error:  # the figures of the other parts must not be lost
            stage.report.problems.append(f"{name}: {error!r}")
            stage.report.figures += [missing(row, bound, f"part {name} failed") for row, bound in part.ROWS.items()]
        finally:
            for child in stage.children.started:
                await child.stop()
