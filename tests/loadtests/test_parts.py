"""Tests of scenarios that consist of parts."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from loadtests.children import Children
from loadtests.figures import Bound, Figure
from loadtests.report import Report
from loadtests.scenarios.common import Options, Stage
from loadtests.scenarios.parts import exact, play_parts
from loadtests.show import Screen

PARTS = ("first", "broken", "second")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that has one module for each name in PARTS. Each module writes the file ledger.db into its
    folder. The module `broken` then raises an error."""
    for name in PARTS:
        row = f"{name} row"

        async def measure(stage: Stage, name: str = name, row: str = row) -> list[Figure]:
            with (stage.folder / "ledger.db").open("x") as file:
                file.write(name)
            if name == "broken":
                raise ZeroDivisionError("no call was answered")
            return [exact(row, 1.0, Bound(">=", 1.0))]

        module = ModuleType(f"parts_of_a_test.{name}")
        vars(module).update(ROWS={row: Bound(">=", 1.0)}, measure=measure)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return "parts_of_a_test"


async def test_a_part_fails_alone(tmp_path: Path, package: str) -> None:
    """If a part of a load-test scenario fails, the report has the part's error and the figures of the other parts.

    The parts share no files.
    """
    report = Report("parts", {})
    async with Children(tmp_path / "logs") as children:
        await play_parts(Stage(Options(), Screen(), children, tmp_path, report), package, PARTS)
    assert [(figure.name, figure.met) for figure in report.figures] == [
        ("first row", True),
        ("broken row", None),
        ("second row", True),
    ]
    (problem,) = report.problems
    assert problem == "broken: ZeroDivisionError('no call was answered')"
