"""PNG plots of a report: latency CDFs of every arm, and throughput against concurrency where a scenario swept it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.report import Arm, Report, middle

QUANTITIES = (("ttft_s", "time to first token"), ("tpot_s", "time per token"), ("e2e_s", "end to end"))


class NoPlots(ValueError):
    """matplotlib is absent; the message says what installs it."""


def check() -> None:
    """Raises NoPlots before anything is measured, rather than after."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise NoPlots("--plot needs matplotlib: pip install 'headrace[bench]'") from None


def write(report: Report, folder: Path) -> list[Path]:
    """All plots that the report has data for; their paths."""
    check()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    arms = [arm for arm in report.arms if arm.rounds]
    written = []
    for name, title in QUANTITIES:
        series = [(arm.name, _values(arm, name)) for arm in arms]
        path = folder / f"{report.scenario}-{name.removesuffix('_s')}.png"
        if _draw(pyplot, path, f"{report.scenario}: {title}", series):
            written.append(path)
    swept = [(arm, _by_concurrency(arm)) for arm in arms]
    if any(len(points) > 1 for _, points in swept):
        path = folder / f"{report.scenario}-throughput.png"
        _draw_sweep(pyplot, path, report.scenario, swept)
        written.append(path)
    return written


def _values(arm: Arm, name: str) -> list[float]:
    values = [getattr(record, name) for one in arm.rounds for record in one.run.good]
    return sorted(value * 1000 for value in values if value is not None)


def _draw(pyplot: Any, path: Path, title: str, series: Sequence[tuple[str, list[float]]]) -> bool:
    series = [(name, values) for name, values in series if values]
    if not series:
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in series:
        axes.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=name)
    axes.set(title=title, xlabel="ms", ylabel="share of calls", ylim=(0, 1.01))
    if min(values[0] for _, values in series) > 0:
        axes.set_xscale("log")
    return _save(pyplot, figure, axes, path)


def _by_concurrency(arm: Arm) -> dict[int, float]:
    rates: dict[int, list[float | None]] = {}
    for one in arm.rounds:
        if (concurrency := one.extra.get("concurrency")) and one.run.duration_s:
            rates.setdefault(int(concurrency), []).append(one.run.tokens / one.run.duration_s)
    return {c: middle(values) or 0.0 for c, values in sorted(rates.items())}


def _draw_sweep(pyplot: Any, path: Path, scenario: str, swept: Sequence[tuple[Arm, dict[int, float]]]) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for arm, points in swept:
        if points:
            axes.plot(list(points), list(points.values()), marker="o", label=arm.name)
    axes.set(title=f"{scenario}: throughput", xlabel="concurrent calls", ylabel="tokens/s", xscale="log")
    _save(pyplot, figure, axes, path)


def _save(pyplot: Any, figure: Any, axes: Any, path: Path) -> bool:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
