"""Cost of the defences without an attack: the CPU time per streamed token of the front end, in this checkout compared
with another checkout.

Both checkouts serve the same requests with a simulated engine, in turn, as in the scenario `relay`. The CPU times of
two processes that run the same code differ by up to a tenth. So several pairs of processes are started, and each pair
serves a part of the rounds. In each round, the CPU time of this checkout is divided by that of the other checkout. The
reported value is the geometric mean of these ratios, with its confidence interval. Only the mean must be within the
bound.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtests.children import ROOT
from loadtests.datasets import fixed
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED
from loadtests.scenarios.common import Contestant, Stage, alternate, check_answers, first_call, per_round, unbind
from loadtests.scenarios.relay import (
    GRPC,
    HTTP,
    LIMITS,
    PROMPT_WORDS,
    SESSION,
    STREAMS,
    TOKENS,
    bind,
    our_arms,
    relay_cpu,
    sim_source,
)  # fmt: skip
from loadtests.serving import ours as serving

ROUNDS = 20
PAIRS = 5
"""Number of pairs of processes, one process of each checkout."""
THIS, OTHER = "this checkout, ", "the other checkout, "
BOUND = Bound("<=", 1.03)
TITLE = "front-end CPU a streamed token, {}, against the other checkout, mean"
ROWS: Mapping[str, Bound] = {TITLE.format(api): BOUND for api in (GRPC, HTTP, SESSION)}


async def measure(stage: Stage) -> list[Figure]:
    """Measure this checkout and the other checkout alternately, and return the report's rows."""
    against = stage.options.against
    if against is None:
        return [missing(row, bound, "no other checkout was named (--against)") for row, bound in ROWS.items()]
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = sim_source(model, stage.options.seed)
    arms: dict[str, Contestant] = {}
    checkouts = [(THIS, ROOT), (OTHER, against.resolve())]
    rounds = max(stage.options.rounds or ROUNDS, 1)
    pairs = min(PAIRS, rounds)
    for pair in range(pairs):
        if stage.options.ends_at is not None and time.monotonic() > stage.options.ends_at:
            stage.report.settings["pairs cut short"] = f"{pair} of {pairs}: time was up"
            break
        first, end = (rounds * at // pairs + 1 for at in (pair, pair + 1))
        ordered = checkouts if pair % 2 == 0 else checkouts[::-1]
        await _play_pair(stage, arms, ordered, pair, range(first, end), bundle, source)
    check_answers(stage.report, list(arms.values()))
    return [_figure(api, arms) for api in (GRPC, HTTP, SESSION)]


async def _play_pair(
    stage: Stage,
    arms: dict[str, Contestant],
    checkouts: Sequence[tuple[str, Path]],
    pair: int,
    numbers: range,
    bundle: Path,
    source: str,
) -> None:
    """Start one gateway process for each checkout, in the order of `checkouts`, and run the rounds with these
    `numbers`. `pair`: number of this set of processes, from 0. `arms`: the measured servers by name, one for each
    checkout and API; the first pair of processes fills this mapping."""
    # The parts of the scenario choose the arms by name, so `--only` must not filter the arms again.
    whole = replace(stage, options=replace(stage.options, only=()))
    started: list[serving.Ours] = []
    unbind()  # started processes inherit the cores of this one
    try:
        for prefix, checkout in checkouts:
            ours = await serving.start(
                stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED,
                name=f"{prefix.split()[1].strip(',')}-{prefix.split()[0]}-{pair + 1}", checkout=checkout,
            )  # fmt: skip
            started.append(ours)
            for fresh in our_arms(replace(whole, part=prefix), ours):
                kept = arms.setdefault(fresh.arm.name, fresh)
                if kept is not fresh:
                    stage.report.arms[:] = [arm for arm in stage.report.arms if arm is not fresh.arm]
                    kept.face, kept.roots = fresh.face, fresh.roots
        roots = [root for ours in started for root, _ in ours.roots]
        stage.report.settings["cores of the part cost"] = bind(
            stage.options.pin, roots, [ours.worker.pid for ours in started]
        )
        first = fixed(1, PROMPT_WORDS, 4, stage.options.seed)[0]
        ready = [arm for arm in arms.values() if await first_call(arm, first)]
        await alternate(
            stage, _interleaved(ready), lambda number: fixed(STREAMS, PROMPT_WORDS, TOKENS, number),
            rounds=len(numbers), concurrency=STREAMS, limits=LIMITS, first_number=numbers.start, check=False,
        )  # fmt: skip
    finally:
        for arm in arms.values():
            await arm.face.close()
        for ours in started:
            await ours.worker.stop()
            await ours.gateway.stop()


def _interleaved(arms: Sequence[Contestant]) -> list[Contestant]:
    """Return the arms (measured servers), sorted so that the arms of the same API are next to each other.

    There is one arm for each API of each of the two checkouts that are compared.
    """
    return sorted(arms, key=lambda arm: arm.arm.name.removeprefix(THIS).removeprefix(OTHER))


def _figure(api: str, arms: Mapping[str, Contestant]) -> Figure:
    this, other = per_round(arms.get(THIS + api), arms.get(OTHER + api), relay_cpu)
    figure = ratio_figure(TITLE.format(api), this, other, BOUND, scale=1e6, difference_unit="µs/token")
    if figure.value is None:
        return figure
    return replace(figure, met=figure.value <= BOUND.limit and figure.reason is None, note="the bound is on the mean")
