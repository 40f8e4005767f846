"""Processes: does a second gateway process on the same ports change the CPU time per token?

256 streams of a simulated engine at 20 ms a step are served over gRPC, alternately by one gateway process and by two
processes that share the port. Gateways are bound to one core, engines and driver to another core. Each of the two
set-ups has its own worker, which links to every gateway process: with two processes, one step is sent as two messages
of half the tokens each.

Some work of a process costs the same for one token as for a hundred: a step, a heartbeat and the wake-up of a sleeping
client. So the single process is also measured with half the streams, which is the load of each of the two processes.
In practice a second process is added to serve more streams, at an unchanged load of each process.
"""

from __future__ import annotations

from loadtests.datasets import fixed
from loadtests.faces.grpc_stream import CHANNELS, GrpcStream
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.processes import SIMULATED, pin, pin_driver
from loadtests.scenarios.common import (
    Contestant,
    Stage,
    check_answers,
    cores,
    first_call,
    per_round,
    rounds_of,
    run_round,
)
from loadtests.scenarios.relay import LIMITS, PROMPT_WORDS, STEP_MS, STREAMS, TOKENS, relay_cpu, sim_source
from loadtests.serving import ours as serving

ONE, TWO, HALF = "one gateway process", "two gateway processes", "one gateway process, half the streams"
COUNTS = {ONE: 1, TWO: 2}
SAME_LOAD = f"CPU per token, two gateway processes with {STREAMS} streams against one with {STREAMS // 2}"
FLAT = f"CPU per token, two gateway processes against one, {STREAMS} streams over gRPC"
BOUND = Bound("<=", 1.1)


async def play(stage: Stage) -> None:
    """Start a gateway with one process and a gateway with two, run rounds on both in turn, and compute the report's
    row."""
    options, report = stage.options, stage.report
    streams, tokens, rounds = options.concurrency or STREAMS, options.tokens or TOKENS, rounds_of(options)
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    sides: dict[str, serving.Ours] = {}
    for name in filter(options.selects, COUNTS):
        sides[name] = await serving.start(
            stage.children, stage.folder, bundle=bundle, source=sim_source(model, options.seed), kind=SIMULATED,
            name=name.replace(" ", "-"), processes=COUNTS[name],
        )  # fmt: skip
    if ONE in sides and TWO in sides:
        sides[HALF] = sides[ONE]
    share = {name: 2 if name == HALF else 1 for name in sides}
    arms = {name: _arm(stage, name, ours, CHANNELS // share[name]) for name, ours in sides.items()}
    report.settings[f"{stage.part}streams"] = {"streams": streams, "tokens": tokens, "step_ms": STEP_MS}
    report.settings[f"{stage.part}cores"] = _bind(options.pin, list(sides.values()))
    try:
        first = fixed(1, PROMPT_WORDS, 4, options.seed)[0]
        ready = {name: arm for name, arm in arms.items() if await first_call(arm, first)}
        for number in range(rounds + 1):
            requests = fixed(streams, PROMPT_WORDS, tokens, options.seed * 1000 + number)
            for name, arm in ready.items():
                own = requests[: max(streams // share[name], 1)]
                if not arm.arm.problem:
                    await run_round(
                        arm, stage.screen, number, own, concurrency=len(own), limits=LIMITS, keep=number > 0
                    )
        check_answers(report, list(ready.values()))
    finally:
        for arm in arms.values():
            await arm.face.close()
    report.figures += [figure(FLAT, arms, TWO, ONE, BOUND), figure(SAME_LOAD, arms, TWO, HALF, None)]


def _arm(stage: Stage, name: str, ours: serving.Ours, channels: int) -> Contestant:
    arm = stage.arm(name, f"StreamChat, one gRPC stream a call, calls in turn over {channels} connections")
    face = GrpcStream(ours.grpc, ours.model, channels=channels, metadata=ours.metadata)
    return Contestant(arm, face, ours.roots)


def _bind(wanted: bool, sides: list[serving.Ours]) -> str:
    plan = cores(wanted)
    if plan is None:
        return "nothing was bound to cores"
    gateways, engines, driver = plan
    for ours in sides:
        for pid, kind in ours.roots:
            pin(pid, engines if kind == SIMULATED else gateways)
    pin_driver(driver)
    return f"gateways on {gateways}, engines on {engines}, driver on {driver}"


def figure(title: str, arms: dict[str, Contestant], ours: str, theirs: str, bound: Bound | None) -> Figure:
    """Return a row of this scenario."""
    pairs = per_round(arms.get(ours), arms.get(theirs), relay_cpu)
    if pairs[0]:
        return ratio_figure(title, *pairs, bound, scale=1e6, difference_unit="µs/token")
    lacking = next((name for name in (ours, theirs) if name not in arms or not arms[name].arm.rounds), ours)
    return missing(
        title, bound, f"{lacking} did not run: {arms[lacking].arm.problem if lacking in arms else 'not asked'}"
    )
