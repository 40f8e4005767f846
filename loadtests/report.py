"""Result of a scenario: the JSON report, and the table on the screen."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtests import machine
from loadtests.figures import Figure
from loadtests.processes import Usage
from loadtests.records import QUANTILES, Run, Slo

SCHEMA = 1
ARMS_A_TABLE = 8


@dataclass(frozen=True, slots=True)
class Round:
    """A run of one arm (a server, measured over one protocol), with the CPU time and memory of its serving side."""

    number: int
    run: Run
    usage: Usage
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self, slo: Slo | None) -> dict[str, Any]:
        """Return the summary, CPU time and memory by class of process, and the raw samples."""
        tokens = self.run.tokens
        return {
            "round": self.number,
            **self.run.summary(slo),
            "problem": self.run.problem or None,
            "cpu_s": {kind: round(s, 3) for kind, s in self.usage.cpu_s.items()},
            "cpu_us_per_token": {k: round(s / tokens * 1e6, 2) for k, s in self.usage.cpu_s.items()} if tokens else {},
            "rss_bytes": dict(self.usage.rss_bytes),
            **self.extra,
            "samples": [record.sample() for record in self.run.records],
        }


@dataclass(slots=True)
class Arm:
    """An arm: one server, measured over one protocol, with its rounds."""

    name: str
    description: str
    rounds: list[Round] = field(default_factory=list)
    problem: str = ""
    """Reason why there are no rounds, or no more rounds. If a process did not start, the reason holds the end of the
    log.
    """


@dataclass(slots=True)
class Report:
    """Result of a scenario."""

    scenario: str
    settings: dict[str, Any] = field(default_factory=dict)
    arms: list[Arm] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    slo: Slo | None = None
    peers: Path | None = None
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    hardware: dict[str, Any] = field(default_factory=machine.hardware)

    def arm(self, name: str, description: str) -> Arm:
        """Add an arm (a measured server) to the report and return it."""
        arm = Arm(name, description)
        self.arms.append(arm)
        return arm

    @property
    def complete(self) -> bool:
        """Whether every arm (measured server) and every round ran to the end, and no problem was recorded."""
        return not self.problems and not any(a.problem or any(r.run.problem for r in a.rounds) for a in self.arms)

    def as_json(self) -> dict[str, Any]:
        """Return the whole report as plain values."""
        return {
            "schema": SCHEMA,
            "scenario": self.scenario,
            "command": shlex.join(["python", "-m", "loadtests", *sys.argv[1:]]),
            "started_at": self.started_at.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - self.started_at).total_seconds(), 1),
            "complete": self.complete,
            "problems": self.problems,
            "hardware": self.hardware,
            "load_average_at_end": machine.hardware()["load_average"],
            "versions": machine.versions(self.peers),
            "settings": self.settings,
            "figures": [figure.as_json() for figure in self.figures],
            "arms": [
                {
                    "name": arm.name,
                    "description": arm.description,
                    "problem": arm.problem or None,
                    "rounds": [r.as_json(self.slo) for r in arm.rounds],
                }
                for arm in self.arms
            ],
        }

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def show(self, console: Console) -> None:
        """Print the tables, then the problems, on the console."""
        shown = [arm for arm in self.arms if arm.rounds]
        for at in range(0, len(shown), ARMS_A_TABLE):
            console.print(_arms(shown[at : at + ARMS_A_TABLE]))
        if self.figures:
            console.print(_figures(self.figures))
        for arm in self.arms:
            if arm.problem:
                console.print(f"{arm.name}: {arm.problem}", style="red", markup=False)
            for kind, count in _errors(arm.rounds).items():
                console.print(f"{arm.name}: {count} calls failed: {kind}", style="red", markup=False)
        for problem in self.problems:
            console.print(problem, style="red", markup=False)
        if not self.complete:
            console.print("this report is partial", style="bold red")


def _errors(rounds: Sequence[Round]) -> dict[str, int]:
    out: dict[str, int] = {}
    for round_ in rounds:
        for kind, count in round_.run.errors().items():
            out[kind] = out.get(kind, 0) + count
        if round_.run.problem:
            out[round_.run.problem] = out.get(round_.run.problem, 0) + 1
    return out


def median_of(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are not None; None if there are no such values."""
    there = sorted(v for v in values if v is not None)
    return there[len(there) // 2] if there else None


def _arms(arms: Sequence[Arm]) -> Table:
    table = Table(title="medians over the rounds", title_justify="left")
    table.add_column("")
    columns = [_column(arm) for arm in arms]
    for arm in arms:
        table.add_column(arm.name, justify="right")
    for name in columns[0] if columns else ():
        table.add_row(name, *(column[name] for column in columns))
    return table


def _column(arm: Arm) -> dict[str, str]:
    runs = [r.run for r in arm.rounds]
    per_token = [(r.usage, r.run.tokens) for r in arm.rounds if r.run.tokens]
    failed = sum(len(run.records) - len(run.good) for run in runs)

    def ms(name: str, percent: float) -> str:
        value = median_of([run.quantile(name, percent) for run in runs])
        return _cell(None if value is None else value * 1000)

    def us(of: Callable[[Usage], float]) -> str:
        return _cell(median_of([of(usage) / tokens * 1e6 for usage, tokens in per_token]))

    gap_s = max((record.longest_gap_s for run in runs for record in run.good), default=None)
    out = {
        "rounds": str(len(runs)),
        "calls (failed)": f"{sum(len(run.records) for run in runs)} ({failed})",
        "requests/s": _cell(median_of([len(run.good) / run.duration_s for run in runs if run.duration_s])),
        "tokens/s": _cell(median_of([run.tokens / run.duration_s for run in runs if run.duration_s])),
    }
    for title, name in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "itl_s"), ("end to end", "e2e_s")):
        out |= {f"{title} ms p{percent}": ms(name, percent) for percent in QUANTILES}
    return out | {
        "longest silent gap ms": _cell(None if gap_s is None else gap_s * 1000),
        "pieces of one token, at least": _cell(median_of([run.one_token_share for run in runs])),
        "front end CPU µs/token": us(Usage.front_end_s),
        "engine CPU µs/token": us(lambda usage: usage.whole_s() - usage.front_end_s()),
        "memory MiB": _cell(median_of([sum(usage.rss_bytes.values()) / 2**20 for usage, _ in per_token])),
        "driver CPU µs/token": _cell(median_of([run.driver_cpu_s / run.tokens * 1e6 for run in runs if run.tokens])),
    }


def _figures(figures: Sequence[Figure]) -> Table:
    table = Table(title="figures (95 % interval)", title_justify="left")
    for name in ("figure", "value", "low", "high", "to reach", "met", "difference", "remark"):
        table.add_column(name, justify="left" if name in ("figure", "remark") else "right")
    for f in figures:
        met = "-" if f.met is None else "yes" if f.met else "no"
        difference = "" if f.difference is None else f"{f.difference:+.3g} {f.difference_unit or ''}"
        remark = "; ".join(filter(None, (f.reason, f.note)))
        table.add_row(f.name, _cell(f.value), _cell(f.low), _cell(f.high), f.bound or "", met, difference, remark)
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
