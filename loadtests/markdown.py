"""A report of the scenario `peers` as a page of Markdown: set-up, figures, medians of each arm (measured server), and
problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests import machine
from loadtests.figures import Figure
from loadtests.report import Report, median_of

LOG_LINES = 12
TRIAL = "**A trial on CPU with a tiny model of random weights. No GPU was used: nothing on this page is a GPU figure.**"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Subject:
    """The model, the command and the hardware that a page of results is about. Without `devices`, the run was a trial
    on CPU."""

    model: str
    architecture: str
    weights_bytes: int
    dtype: str
    command: str
    devices: Sequence[Device] = ()
    driver: str = ""


def page(subject: Subject, reports: Sequence[tuple[str, Report]], notes: Sequence[str] = ()) -> str:
    """Return the page. `reports`: each report with its heading. The page gives the hardware and versions of the first
    report only.
    """
    first = reports[0][1]
    title = "Load test on GPUs" if subject.devices else "Trial of the GPU load test, on CPU"
    lines = [f"# {title}, {first.started_at:%Y-%m-%d}", ""]
    if not subject.devices:
        lines += [TRIAL, ""]
    lines += _table(("what", "value"), [*_facts(subject, first).items()])
    lines += ["", *(f"{note}\n" for note in notes)]
    for heading, report in reports:
        lines += [f"## {heading}", "", *_settings(report), *_figures(report.figures), "", *_arms(report)]
        lines += _problems(report)
    return "\n".join(lines).rstrip() + "\n"


def _facts(subject: Subject, report: Report) -> dict[str, str]:
    hardware, versions = report.hardware, machine.versions(report.peers)
    gpus: dict[str, int] = {}
    for device in subject.devices:
        name = f"{device.name}, {device.total_bytes / 2**30:.0f} GiB"
        gpus[name] = gpus.get(name, 0) + 1
    commit = versions.pop("commit", "unknown")
    return {
        "GPU": "; ".join(f"{count} x {name}" for name, count in gpus.items()) or "none was used",
        "driver": subject.driver or "none",
        "CPU": f"{hardware['cores']} x {hardware['cpu']}, {hardware['memory_gib']} GiB, Linux {hardware['kernel']}",
        "model": f"{subject.model} ({subject.architecture}, {subject.weights_bytes / 2**30:.2f} GiB of weights)",
        "arithmetic": subject.dtype,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": commit,
        "command": f"`{subject.command}`",
        "load average at the begin": ", ".join(map(str, hardware["load_average"])),
    }


def _settings(report: Report) -> list[str]:
    names = ("engine", "streams", "rounds", "cores", "rounds cut short")
    lines = [f"- {name}: {report.settings[name]}" for name in names if name in report.settings]
    lines += [f"- {name}: {value}" for name, value in report.settings.items() if name.startswith("equal texts")]
    return [*lines, ""] if lines else []


def _figures(figures: Sequence[Figure]) -> list[str]:
    head = ("figure", "value", "95 % interval", "to reach", "met", "difference", "rounds", "remark")
    return _table(head, [_figure(figure) for figure in figures])


def _figure(f: Figure) -> tuple[str, ...]:
    interval = "" if f.low is None or f.high is None else f"{f.low:.3g} to {f.high:.3g}"
    met = "-" if f.met is None else "yes" if f.met else "no"
    difference = "" if f.difference is None else f"{f.difference:+.3g} {f.difference_unit or ''}".strip()
    value = "not measured" if f.value is None else f"{f.value:.3g}"
    remark = "; ".join(filter(None, (f.reason, f.note)))
    return f.name, value, interval, f.bound or "", met, difference, str(f.rounds), remark


def _arms(report: Report) -> list[str]:
    rows = []
    for arm in report.arms:
        if not arm.rounds:
            continue
        runs = [round_.run for round_ in arm.rounds]
        cpu = [round_.usage.front_end_s() / round_.run.tokens * 1e6 for round_ in arm.rounds if round_.run.tokens]
        values: Mapping[str, float | None] = {
            "tokens/s": median_of([run.tokens / run.duration_s for run in runs if run.duration_s]),
            "TTFT p50": _ms(median_of([run.quantile("ttft_s", 50) for run in runs])),
            "TTFT p99": _ms(median_of([run.quantile("ttft_s", 99) for run in runs])),
            "TPOT p50": _ms(median_of([run.quantile("tpot_s", 50) for run in runs])),
            "CPU": median_of(cpu),
        }
        failed = sum(len(run.records) - len(run.good) for run in runs)
        rows.append((arm.name, str(len(runs)), *map(_number, values.values()), str(failed)))
    head = ("medians over the rounds", "rounds", "tokens/s", "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms")
    return [*_table((*head, "front-end CPU, µs/token", "failed calls"), rows), ""] if rows else []


def _problems(report: Report) -> list[str]:
    """Return each problem once, with the end of the problem's log."""
    by_text: dict[str, list[str]] = {}
    for arm in report.arms:
        if arm.problem:
            by_text.setdefault(arm.problem, []).append(arm.name)
    texts = [f"{', '.join(names)}: {text}" for text, names in by_text.items()] + list(report.problems)
    out = ["This report is partial.", ""] if texts else []
    for text in texts:
        first, *rest = text.splitlines()
        log = ["", "  ```", *(f"  {line}" for line in rest[-LOG_LINES:]), "  ```"] if rest else []
        out += [f"- {first}", *log, ""]
    return out


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    out = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return out + [f"| {' | '.join(map(_cell, row))} |" for row in rows]
