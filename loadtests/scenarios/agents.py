"""Agents: tool calls, reasoning and long conversations, beside vLLM's own server.

Each part is a module of loadtests/agents with rows of its own, in the order of the table. `--only PART` runs some of
the parts.
"""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, cast

from loadtests.children import DidNotStart
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage
from loadtests.traces import NoData

PARTS = ("bfcl", "forced", "turns")
"""Names of the modules of loadtests/agents that are parts."""
NOT_ASKED = "not selected (--only)"


class Part(Protocol):
    """Protocol that every part implements."""

    ROWS: Mapping[str, Bound | None]
    """Rows of the part, with the bound of each row; None for a row without a bound."""
    measure: Callable[[Stage], Awaitable[list[Figure]]]
    """Function that returns one figure for each row. Raises RuntimeError, DidNotStart, TimeoutError, or NoData if
    something that the part needs was not fetched.
    """


async def play(stage: Stage) -> None:
    """Run the selected parts, and report the rows of the parts in the table's order."""
    for name in PARTS:
        part = cast(Part, importlib.import_module(f"loadtests.agents.{name}"))
        if not stage.options.selects(name):
            stage.report.figures += [missing(row, bound, NOT_ASKED) for row, bound in part.ROWS.items()]
            continue
        stage.screen.say(f"part {name}")
        try:
            stage.report.figures += await part.measure(stage)
        except (RuntimeError, DidNotStart, TimeoutError, NoData) as error:
            stage.report.problems.append(f"{name}: {error}")
            stage.report.figures += [missing(row, bound, f"part {name} failed") for row, bound in part.ROWS.items()]
        finally:
            for child in stage.children.started:
                await child.stop()
