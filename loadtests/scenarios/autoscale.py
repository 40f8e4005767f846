"""The autoscaler in virtual time, compared with the clairvoyant optimum, Ray Serve's policy and the best static
placement.

The calls come from public traces and arrive at the traces' own times. The production policy scales simulated replicas,
whose cold start takes 60 s. The optimum, the policy and the baselines use the same model of a replica and begin with
the same number of replicas; the policy sees only what a controller sees. `--rounds` is the number of seeds. A seed
determines how copied calls are spread, when ServeGen's calls arrive, and which clients are chosen.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from loadtests import traces
from loadtests.autoscale.runs import HELD_OUT, TRACES, CaseResults, Shared, compare, share
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage

ROUNDS = 1
WITH_RAY = ("azure-conv", "mooncake", "azure-code")
AGAINST = {"azure-conv": 1.15, "mooncake": 1.15, "servegen-week": 1.15, "azure-code": 1.5}


async def play(stage: Stage) -> None:
    """Run all cases with all seeds. `--only` selects cases by name; `shared` is the case of several models under one
    GPU budget."""
    options = stage.options
    seeds = [options.seed + number for number in range(options.rounds or ROUNDS)]
    names = [name for name in (*TRACES, *HELD_OUT) if options.selects(name)]
    try:
        traces.load("azure-conv")
    except traces.NoData as error:
        stage.report.problems.append(str(error))
        return
    loop = asyncio.get_running_loop()
    cores = max(min(len(os.sched_getaffinity(0)), 8), 1)
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = {
            name: [loop.run_in_executor(pool, compare, name, seed, name in WITH_RAY) for seed in seeds]
            for name in names
        }
        sharing = [loop.run_in_executor(pool, share, seed) for seed in seeds] if options.selects("shared") else []
        waiting: list[asyncio.Future[Any]] = [
            *sharing,
            *(run for case_results in runs.values() for run in case_results),
        ]
        for number, done in enumerate(asyncio.as_completed(waiting), 1):
            result = await done
            stage.screen.say(f"{number} of {len(waiting)}: {summary_line(result)}")
        results_by_case = {name: list(await asyncio.gather(*case_results)) for name, case_results in runs.items()}
        shared = list(await asyncio.gather(*sharing))
    stage.report.settings |= {
        "seeds": seeds,
        "cold_start_s": 60.0,
        "cases": {
            name: [report_values(result) for result in case_results] for name, case_results in results_by_case.items()
        },
        "shared": [asdict(result) for result in shared],
        "lines": {
            name: asdict(case_results[0].ours.line)
            for name, case_results in results_by_case.items()
            if case_results[0].ours.line is not None
        },
    }
    add_figures(stage, results_by_case, shared)


def summary_line(result: CaseResults | Shared) -> str:
    """Return the result as one line of text."""
    if isinstance(result, Shared):
        return f"shared: {result.ours_good:.0f} calls within the slo, static {result.static_good:.0f}"
    best = f"{result.optimum.cost_s:.0f}" if result.optimum is not None else "none"
    ours = result.ours
    return f"{result.name}: {ours.gpu_s:.0f} GPU-seconds, {ours.attainment:.2%} within the slo; optimum {best}"


def report_values(result: CaseResults) -> dict[str, Any]:
    """Return the values of a result that belong in the report. Values over time (the lines of plots and the optimal
    plan) are left out."""
    ours = {k: v for k, v in asdict(result.ours).items() if k != "line"}
    optimum = result.optimum and {k: v for k, v in asdict(result.optimum).items() if k != "replicas"}
    ray = result.ray_best and {"settings": asdict(result.ray_best[0]), **asdict(result.ray_best[1])}
    equal = result.ray_equal and {"settings": asdict(result.ray_equal[0]), **asdict(result.ray_equal[1])}
    default = result.ray_default and asdict(result.ray_default)
    return {
        "load": result.load,
        "ours": ours,
        "optimum": optimum,
        "ray default": default,
        "ray best of grid": ray,
        "ray at like cost": equal,
    }


def spread_figure(
    name: str, values: Sequence[float], bound: Bound | None, note: str, unit: str = "ratio", holds: bool = True
) -> Figure:
    """Return a row with the mean, the least and the largest value over the seeds. The bound is met if the worst value
    is inside it, and never if `holds` is false.
    """
    if not values:
        return missing(name, bound, "not run")
    worst = max(values) if bound is None or bound.sense == "<=" else min(values)
    met = None
    if bound is not None:
        met = holds and (worst <= bound.limit if bound.sense == "<=" else worst >= bound.limit)
    mean = sum(values) / len(values)
    return Figure(
        name, mean, min(values), max(values), str(bound) if bound else None, met,
        None if holds else "the slo was not held", unit, rounds=len(values), note=note,
    )  # fmt: skip


def add_figures(stage: Stage, results_by_case: dict[str, list[CaseResults]], shared: Sequence[Shared]) -> None:
    """Add the scenario's rows to the report."""
    figures = stage.report.figures
    for name, case_results in results_by_case.items():
        known = [result for result in case_results if result.optimum is not None]
        ratios = [result.ours.gpu_s / result.optimum.cost_s for result in known if result.optimum is not None]
        least = min(result.ours.attainment for result in case_results)
        bound = Bound("<=", AGAINST[name]) if name in AGAINST else None
        note = f"within the slo: {least:.2%}" + (", held out" if name in HELD_OUT else "")
        if known and known[0].optimum is not None:
            note += f"; optimum {known[0].optimum.attainment:.2%}, {known[0].optimum.cost_s:.0f} GPU-seconds"
        figures.append(
            spread_figure(f"GPU-seconds against the optimum, {name}", ratios, bound, note, holds=least >= 0.99)
            if ratios
            else missing(f"GPU-seconds against the optimum, {name}", bound, f"no optimum was found; {note}")
        )
    for name in WITH_RAY:
        add_ray(figures, name, results_by_case.get(name, []))
    add_shared(figures, shared)
    downs = sum(result.ours.downs for case_results in results_by_case.values() for result in case_results) + sum(
        s.downs for s in shared
    )
    back = sum(result.ours.taken_back for case_results in results_by_case.values() for result in case_results) + sum(
        s.taken_back for s in shared
    )
    if downs:
        figures.append(
            spread_figure(
                "scale-downs taken back within a cold start", [back / downs], Bound("<=", 0.01), f"{back} of {downs}"
            )
        )


def add_ray(figures: list[Figure], name: str, case_results: Sequence[CaseResults]) -> None:
    """Add figures that compare our policy with Ray Serve's policy: with its default settings, and with the best
    settings of a grid search."""
    picks: tuple[tuple[str, Callable[[CaseResults], Any]], ...] = (
        ("defaults", lambda result: result.ray_default),
        ("best of the grid", lambda result: result.ray_best and result.ray_best[1]),
    )
    for label, pick in picks:
        pairs = [(result.ours, theirs) for result in case_results if (theirs := pick(result)) is not None]
        if not pairs:
            continue
        note = f"Ray Serve's: {pairs[0][1].attainment:.2%} within the slo, ours {pairs[0][0].attainment:.2%}"
        gpu = [ours.gpu_s / theirs.gpu_s for ours, theirs in pairs]
        figures.append(
            spread_figure(f"GPU-seconds against Ray Serve's policy, {label}, {name}", gpu, Bound("<=", 0.7), note)
        )
        late = [ours.violations / max(theirs.violations, 1.0) for ours, theirs in pairs]
        figures.append(
            spread_figure(f"violations against Ray Serve's policy, {label}, {name}", late, Bound("<=", 0.25), note)
        )
    if not case_results:
        return
    title, bound = (
        f"violations against Ray Serve's policy, at most ours / 0.7 in GPU-seconds, {name}",
        Bound("<=", 0.25),
    )
    fair = [(result.ours, result.ray_equal[1]) for result in case_results if result.ray_equal is not None]
    if not fair:
        figures.append(missing(title, bound, "nothing in the grid is that cheap"))
        return
    ours, theirs = fair[0]
    note = (
        f"Ray Serve's: {theirs.attainment:.2%} within the slo with {theirs.gpu_s / ours.gpu_s:.2f} of our GPU-seconds"
    )
    late = [ours.violations / max(theirs.violations, 1.0) for ours, theirs in fair]
    figures.append(spread_figure(title, late, bound, note))


def add_shared(figures: list[Figure], shared: Sequence[Shared]) -> None:
    """Add the rows for twenty models on sixteen GPUs."""
    if not shared:
        return
    seconds = 12 * 3600.0
    per = [(s.ours_good / s.ours_gpu_s) / (s.static_good / (s.static_gpus * seconds)) for s in shared]
    both = [s.ours_good / s.static_good for s in shared]
    note = "; ".join(
        f"ours {s.ours_good / s.arrived:.1%} of calls with {s.ours_gpu_s / seconds:.1f} GPUs, "
        f"static {s.static_good / s.arrived:.1%} with {s.static_gpus}"
        for s in shared
    )
    title = "20 models on 16 GPUs against the best static placement"
    figures.append(spread_figure(f"{title}: goodput per GPU-second held", per, Bound(">=", 1.5), note))
    figures.append(spread_figure(f"{title}: goodput", both, None, note))
