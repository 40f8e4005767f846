"""A small run of the scenario `processes`. All servers answer every call. The report has the scenario's row, although
the run has too few rounds to pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.children import Children
from loadtests.report import Report
from loadtests.scenarios import processes
from loadtests.scenarios.common import Options, Stage
from loadtests.show import Screen


@pytest.mark.slow
@pytest.mark.long
async def test_the_row_of_two_processes(tmp_path: Path) -> None:
    """All servers give complete answers with equal texts, and the gateways' CPU time is counted. The report has two
    figures, and only the first has a bound."""
    report = Report("processes")
    options = Options(rounds=1, tokens=8, concurrency=32, pin=False)
    async with Children(tmp_path / "logs", term_s=2.0) as children:
        await processes.play(Stage(options, Screen(), children, tmp_path, report))
    assert report.complete, report.problems
    for arm, calls in zip(report.arms, (32, 32, 16), strict=True):
        ((round_,),) = (arm.rounds,)
        assert [record.tokens for record in round_.run.good] == [8] * calls
        assert "gateway" in round_.usage.cpu_s
    figure, same_load = report.figures
    assert (figure.name, same_load.name, same_load.bound) == (processes.FLAT, processes.SAME_LOAD, None)
    assert figure.bound == "<= 1.1"
    assert figure.reason is not None
    assert not figure.met
