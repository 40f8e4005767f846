"""The command `slo` prints a month's SLO attainment: the share of judged calls that met the SLO of their model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cluster.cli.commands.operate.slo import days_of
from cluster.ledger.store import Ledger
from tests.ledger.samples import record

Run = Callable[..., Result]
OCTOBER_S = 1_791_000_000.0
"""A second in October 2026."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A configuration with one model, and a ledger with calls of two tenants in October 2026."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.upgrade()
    at: dict[str, Any] = {"opened_at_s": OCTOBER_S, "completion_tokens": 50}
    ledger.usage.insert([
        *(record(f"good{n}", **at) for n in range(19)),
        record("late", ttft_s=1.9, **at),
        record("zoo", tenant="zoo", outcome="worker_lost", **at),
        record("old", model="removed", **at),
        record("september", **(at | {"opened_at_s": OCTOBER_S - 30 * 86400})),
    ])  # fmt: skip
    ledger.close()
    config = tmp_path / "cluster.yaml"
    config.write_text(
        f"api_version: headrace/v1\nname: x\nstore: {{database_url: 'sqlite:///{tmp_path / 'ledger.db'}'}}\n"
        "models: [{name: tiny, source: 'demo://smollm2', slo: {ttft_s: 1, itl_s: 0.1, target: 0.9}}]\n"
    )
    return config


def test_attainment_of_a_month(run: Run, file: Path) -> None:
    """`headrace slo --json` prints the calls, the good calls, the attainment, the objective and the error
    budget.

    The JSON also names the source of the numbers, and says which calls are missing in this source.
    """
    done = run("slo", "--month", "2026-10", "--json", "-f", str(file))
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["month"], answer["since_day"], answer["until_day"]) == ("2026-10", "2026-10-01", "2026-10-31")
    assert "usage records" in answer["source"]
    assert any("refused before a worker" in sentence for sentence in answer["missing"])
    removed, acme, zoo = answer["sums"]
    assert (acme["tenant"], acme["model"], acme["calls"], acme["good"], acme["late_first_token"]) == (
        "acme", "tiny", 20, 19, 1
    )  # fmt: skip
    assert (acme["attainment"], acme["target"]) == (0.95, 0.9)
    assert acme["budget_left"] == pytest.approx(0.5)
    assert (zoo["failed"], zoo["attainment"]) == (1, 0.0)
    assert (removed["model"], removed["attainment"], removed["not_judged"]) == ("removed", None, 1)


def test_attainment_for_people(run: Run, file: Path) -> None:
    """The command `slo` prints a table with one row for each tenant and model.

    The text below the table names the source of the numbers, and the calls that the source lacks. For a month
    without calls, the output says that there are none.
    """
    text = run("slo", "--month", "2026-10", "--tenant", "acme", "--model", "tiny", "-f", str(file)).stdout
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["tenant", "model", "objective", "calls"]
    assert "0.9 within 1 s, 0.1 s" in lines[1]
    assert "95.000 %" in lines[1]
    assert "50.0 %" in lines[1]
    assert "headrace_slo_calls_total" in text
    assert "no calls in 2026-09" in run("slo", "--month", "2026-09", "--tenant", "zoo", "-f", str(file)).stdout


@pytest.mark.parametrize("month", ["october", "2026-13", "2026-1", "9999-01"])
def test_a_wrong_month_is_bad_usage(run: Run, file: Path, month: str) -> None:
    """A malformed month or a future month is bad usage: the exit code is 2, and the error names the option."""
    done = run("slo", "--month", month, "-f", str(file))
    assert (done.exit_code, f"--month {month}" in done.stderr) == (2, True)


def test_days_of_a_month() -> None:
    """`days_of` returns the first and the last day of a month, also in leap years.

    If the month is "", it is the month of the given time in UTC.
    """
    assert days_of("2024-02", OCTOBER_S) == ("2024-02-01", "2024-02-29")
    assert days_of("", OCTOBER_S) == ("2026-10-01", "2026-10-31")
