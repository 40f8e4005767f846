"""Processes: whether a second gateway process on the same ports leaves the CPU time of a token what it was.

256 streams of a simulated engine at 20 ms a step over gRPC, by one gateway process and by two that share the port, in
turns. Gateways are bound to one core, engines and driver to another. Each has a worker of its own, which links to
every process: with two the same step goes out as two messages of half the tokens.
"""

from __future__ import annotations

import os

from loadtests.datasets import fixed
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED, pin
from loadtests.scenarios.common import Contestant, Stage, cores, first_call, per_round, rounds_of, take_turns
from loadtests.scenarios.relay import LIMITS, PROMPT_WORDS, STEP_MS, STREAMS, TOKENS, relay_cpu, sim_source
from loadtests.serving import ours as serving

ONE, TWO = "one gateway process", "two gateway processes"
COUNTS = {ONE: 1, TWO: 2}
FLAT = f"CPU per token, two gateway processes against one, {STREAMS} streams over gRPC"
BOUND = Bound("<=", 1.1)


async def play(stage: Stage) -> None:
    """Start both, take turns, work out the row."""
    options, report = stage.options, stage.report
    streams, tokens, rounds = options.concurrency or STREAMS, options.tokens or TOKENS, rounds_of(options)
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    sides: dict[str, serving.Ours] = {}
    for name in filter(options.wants, COUNTS):
        sides[name] = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=sim_source(model, options.seed), kind=SIMULATED,
            name=name.replace(" ", "-"), processes=COUNTS[name],
        )  # fmt: skip
    arms = {
        name: Contestant(
            stage.arm(name, "StreamChat, one gRPC stream a call, calls in turn over 16 connections"),
            GrpcStream(ours.grpc, ours.model),
            ours.roots,
        )
        for name, ours in sides.items()
    }
    report.settings[f"{stage.part}streams"] = {"streams": streams, "tokens": tokens, "step_ms": STEP_MS}
    report.settings[f"{stage.part}cores"] = _bind(options.pin, list(sides.values()))
    try:
        ready = [arm for arm in arms.values() if await first_call(arm, fixed(1, PROMPT_WORDS, 4, options.seed)[0])]
        await take_turns(
            stage, ready, lambda number: fixed(streams, PROMPT_WORDS, tokens, options.seed * 1000 + number),
            rounds=rounds, concurrency=streams, limits=LIMITS,
        )  # fmt: skip
    finally:
        for arm in arms.values():
            await arm.face.close()
    report.figures.append(figure(arms))


def _bind(wanted: bool, sides: list[serving.Ours]) -> str:
    plan = cores(wanted)
    if plan is None:
        return "nothing was bound to cores"
    gateways, engines, driver = plan
    for ours in sides:
        for pid, kind in ours.roots:
            pin(pid, engines if kind == SIMULATED else gateways)
    pin(os.getpid(), driver)
    return f"gateways on {gateways}, engines on {engines}, driver on {driver}"


def figure(arms: dict[str, Contestant]) -> Figure:
    """The row of this scenario."""
    two, one = per_round(arms.get(TWO), arms.get(ONE), relay_cpu)
    if two:
        return ratio_figure(FLAT, two, one, BOUND, scale=1e6, difference_unit="µs/token")
    lacking = next((name for name in COUNTS if name not in arms or not arms[name].arm.rounds), TWO)
    return missing(
        FLAT, BOUND, f"{lacking} did not run: {arms[lacking].arm.problem if lacking in arms else 'not asked'}"
    )
