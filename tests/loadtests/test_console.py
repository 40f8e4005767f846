"""Tests of the load-test scenario `console`: each figure has a row in the report, and the load test opens consoles in
the same way as a browser."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest

from loadtests.console import bed, cost, memory
from loadtests.console.bed import ConsoleBed
from loadtests.figures import Bound
from loadtests.processes import Usage
from loadtests.records import Run
from loadtests.report import Round
from loadtests.scenarios.console import PARTS
from tests.support.admin import role_key
from tests.support.keyed import keyed_cluster


def test_each_part_has_rows_and_bounds() -> None:
    """Each part has a function `measure`, and rows with the required bounds."""
    bounds: dict[str, Bound | None] = {}
    for name in PARTS:
        part: Any = importlib.import_module(f"loadtests.console.{name}")
        assert asyncio.iscoroutinefunction(part.measure)
        bounds |= part.ROWS
    limits = [bound.limit for bound in bounds.values() if bound is not None]
    assert limits == [64.0, 1.0, 1.5, 100.0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 3.0]


def test_the_cost_is_what_the_same_calls_took_more() -> None:
    """The consoles' share of a core is the CPU time that a round takes more with consoles than without, in percent of
    the duration of the round with consoles."""

    def played(number: int, cpu_s: float) -> Round:
        return Round(number, Run([], 10.0, 0.0), Usage({"gateway": cpu_s, "simulated engine": 9.0}, {}))

    assert cost._core_shares([played(1, 2.2), played(2, 2.0)], [played(1, 2.0)]) == [pytest.approx(2.0)]


def test_the_history_is_filled() -> None:
    """The load test fills every step of the console's history, and reports the size of the history's arrays."""
    filled = memory.fill(2, 1)
    assert filled["steps"] == 720
    assert filled["arrays"] > 0


async def test_consoles_read_events(tmp_path: Path) -> None:
    """Simulated consoles sign in with a key, and each gets the first document of its event stream. A sign-in with a
    wrong key raises an error, and so does a console that the gateway refuses."""
    async with keyed_cluster(tmp_path) as keyed:
        key = await role_key(keyed.ledger, "ops", "operator")
        await keyed.until_known("ops", key)
        endpoints = dict(keyed.gateway.endpoints)
        place: Any = ConsoleBed(None, None, endpoints, "", key)  # type: ignore[arg-type]
        cookie = await asyncio.to_thread(bed.sign_in, place.origin, key)
        async with bed.open_consoles(place, cookie, 3) as readers:
            assert [(reader.status, reader.states) for reader in readers] == [(200, 1)] * 3
        with pytest.raises(RuntimeError, match="refused the key"):
            await asyncio.to_thread(bed.sign_in, place.origin, "hr_wrong_key")
        with pytest.raises(RuntimeError, match="a console was refused"):
            async with bed.open_consoles(place, "headrace=none", 1):
                pass
