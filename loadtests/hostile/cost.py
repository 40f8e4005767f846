"""Cost of the defences without an attack: the front-end CPU time per streamed token of this checkout, compared with
another checkout.

Both checkouts serve the same requests over a simulated engine, alternating (`relay` has the set-up). The value is the
geometric mean of the rounds' ratios. The bound applies to the mean; the interval is reported together with the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loadtests.children import ROOT
from loadtests.datasets import fixed
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED
from loadtests.scenarios.common import Contestant, Stage, alternate, first_call, per_round
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
THIS, OTHER = "this checkout, ", "the other checkout, "
BOUND = Bound("<=", 1.03)
TITLE = "front-end CPU a streamed token, {}, against the other checkout, mean"
ROWS: Mapping[str, Bound] = {TITLE.format(api): BOUND for api in (GRPC, HTTP, SESSION)}


async def measure(stage: Stage) -> list[Figure]:
    """Run both checkouts alternately and return the report's rows."""
    against = stage.options.against
    if against is None:
        return [missing(row, bound, "no other checkout was named (--against)") for row, bound in ROWS.items()]
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = sim_source(model, stage.options.seed)
    arms: dict[str, Contestant] = {}
    workers = []
    # The parts of the scenario choose the arms by name, so `--only` must not filter the arms again.
    whole = replace(stage, options=replace(stage.options, only=()))
    for prefix, checkout in ((THIS, ROOT), (OTHER, against.resolve())):
        ours = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=source, kind=SIMULATED,
            name=prefix.split()[1].strip(",") + "-" + prefix.split()[0], checkout=checkout,
        )  # fmt: skip
        workers.append(ours.worker.pid)
        arms |= {arm.arm.name: arm for arm in our_arms(replace(whole, part=prefix), ours)}
    roots = [root for arm in arms.values() for root, _ in arm.roots]
    stage.report.settings["cores of the part cost"] = bind(stage.options.pin, roots, workers)
    rounds = max(stage.options.rounds or ROUNDS, 1)
    try:
        first = fixed(1, PROMPT_WORDS, 4, stage.options.seed)[0]
        ready = [arm for arm in arms.values() if await first_call(arm, first)]
        await alternate(
            stage, _interleaved(ready), lambda number: fixed(STREAMS, PROMPT_WORDS, TOKENS, number),
            rounds=rounds, concurrency=STREAMS, limits=LIMITS,
        )  # fmt: skip
    finally:
        for arm in arms.values():
            await arm.face.close()
    return [_figure(api, arms) for api in (GRPC, HTTP, SESSION)]


def _interleaved(arms: Sequence[Contestant]) -> list[Contestant]:
    """Return the arms in an order in which the two checkouts of one API follow each other."""
    return sorted(arms, key=lambda arm: arm.arm.name.removeprefix(THIS).removeprefix(OTHER))


def _figure(api: str, arms: Mapping[str, Contestant]) -> Figure:
    this, other = per_round(arms.get(THIS + api), arms.get(OTHER + api), relay_cpu)
    figure = ratio_figure(TITLE.format(api), this, other, BOUND, scale=1e6, difference_unit="µs/token")
    if figure.value is None:
        return figure
    return replace(figure, met=figure.value <= BOUND.limit and figure.reason is None, note="the bound is on the mean")
