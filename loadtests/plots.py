"""PNG plots of a report: the distribution of latencies of each compared server, throughput against concurrency if the
scenario varied it, gaps between chunks around faults, and demand, replicas and violations of an autoscaler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.report import Arm, Report, median_of

SIZE = (9, 4.5)
QUANTITIES = (("ttft_s", "time to first token"), ("tpot_s", "time per token"), ("e2e_s", "end to end"))


class NoPlots(ValueError):
    """Raised when matplotlib is absent. The message says which command installs matplotlib."""


def check() -> None:
    """Check that matplotlib is present. Raises NoPlots, so that the program ends before it measures anything."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise NoPlots("--plot needs matplotlib: pip install 'headrace[bench]'") from None


def write(report: Report, folder: Path) -> list[Path]:
    """Write all plots that the report has data for; return the paths of the files."""
    check()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part, arms in _parts(report).items():
        stem = "-".join(filter(None, (report.scenario, part.replace(" ", "-"))))
        for name, title in QUANTITIES:
            path = folder / f"{stem}-{name.removesuffix('_s')}.png"
            series = [(label, _values(arm, name)) for label, arm in arms]
            if _draw(pyplot, path, f"{report.scenario}{', ' * bool(part)}{part}: {title}", series):
                written.append(path)
    swept = _by_concurrency(report)
    if any(len(points) > 1 for points in swept.values()):
        path = folder / f"{report.scenario}-throughput.png"
        _draw_sweep(pyplot, path, report.scenario, swept)
        written.append(path)
    around = report.settings.get("recovery", {}).get("gaps around faults", {})
    if any(around.values()):
        path = folder / f"{report.scenario}-gaps.png"
        _draw_gaps(pyplot, path, report.scenario, around)
        written.append(path)
    for name, curves in report.settings.get("ttft_ms", {}).items():
        path = folder / f"{report.scenario}-{name.replace(' ', '-')}-ttft.png"
        if _draw(pyplot, path, f"{report.scenario}, {name}: time to first token", list(curves.items())):
            written.append(path)
    for name, line in report.settings.get("lines", {}).items():
        path = folder / f"{report.scenario}-{''.join(c if c.isalnum() else '-' for c in name)}.png"
        _draw_scaling(pyplot, path, f"{report.scenario}: {name}", line)
        written.append(path)
    return written


def _draw_scaling(pyplot: Any, path: Path, title: str, line: Mapping[str, Sequence[float]]) -> None:
    """Plot two diagrams over time: demand and replicas in the upper one, calls outside the SLO in the lower one."""
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=SIZE, layout="constrained", height_ratios=(3, 1)
    )
    above.step(line["at_s"][: len(line["load"])], line["load"], where="post", linewidth=0.8, label="demand (replicas)")
    above.step(line["at_s"], line["held"], where="post", label="replicas held")
    above.set(title=title, ylabel="replicas")
    above.grid(alpha=0.3)
    below.step(line["at_s"], line["late"], where="post", color="tab:red", label="calls outside the slo")
    below.set(xlabel="s", ylabel="calls")
    _save(pyplot, figure, below, path)


def _draw_gaps(pyplot: Any, path: Path, scenario: str, around: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw each gap between two chunks of a stream as a dot. x: end of the gap in seconds after the fault; y: its
    length."""
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    for kind, gaps in around.items():
        axes.plot([at for at, _ in gaps], [gap * 1000 for _, gap in gaps], ".", markersize=2, label=kind)
    axes.axvline(0, linewidth=0.8, color="black")
    axes.set(
        title=f"{scenario}: gaps between chunks around faults", xlabel="s after the fault", ylabel="ms", yscale="log"
    )
    _save(pyplot, figure, axes, path)


def _parts(report: Report) -> dict[str, list[tuple[str, Arm]]]:
    """Return the arms (measured servers), grouped by the part of their names before the colon. Each group gets one
    picture."""
    parts: dict[str, list[tuple[str, Arm]]] = {}
    for arm in report.arms:
        part, colon, label = arm.name.partition(": ")
        if arm.rounds:
            parts.setdefault(part if colon else "", []).append((label if colon else arm.name, arm))
    return parts


def _values(arm: Arm, name: str) -> list[float]:
    values = [getattr(record, name) for round_ in arm.rounds for record in round_.run.good]
    return sorted(value * 1000 for value in values if value is not None)


def _draw(pyplot: Any, path: Path, title: str, series: Sequence[tuple[str, list[float]]]) -> bool:
    series = [(name, values) for name, values in series if values]
    if not series:
        return False
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    for name, values in series:
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=name)
    axes.set(title=title, xlabel="ms", ylabel="share of calls", ylim=(0, 1.01))
    if min(values[0] for _, values in series) > 0:
        axes.set_xscale("log")
    return _save(pyplot, figure, axes, path)


def _by_concurrency(report: Report) -> dict[str, dict[int, float]]:
    """Return tokens per second, by arm (measured server) and concurrency.

    The figures of an arm named `one stream: X` are added to those of the arm X.
    """
    rates: dict[str, dict[int, list[float | None]]] = {}
    for arm in report.arms:
        points = rates.setdefault(arm.name.removeprefix("one stream: "), {})
        for round_ in arm.rounds:
            if (concurrency := round_.extra.get("concurrency")) and round_.run.duration_s:
                points.setdefault(int(concurrency), []).append(round_.run.tokens / round_.run.duration_s)
    return {
        name: {level: median_of(values) or 0.0 for level, values in sorted(points.items())}
        for name, points in rates.items()
    }


def _draw_sweep(pyplot: Any, path: Path, scenario: str, swept: dict[str, dict[int, float]]) -> None:
    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    for name, points in swept.items():
        if len(points) > 1:
            axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set(title=f"{scenario}: throughput", xlabel="concurrent calls", ylabel="tokens/s", xscale="log")
    _save(pyplot, figure, axes, path)


def _save(pyplot: Any, figure: Any, axes: Any, path: Path) -> bool:
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
