"""Smoke test for CI: each API of Headrace runs once over a simulated engine, in seconds. There is no threshold on
time."""

from __future__ import annotations

from loadtests.arrivals import gamma
from loadtests.datasets import fixed, prefixes
from loadtests.driver import Limits
from loadtests.figures import Figure, missing, plain_figure
from loadtests.figures import mean as mean_of
from loadtests.records import Slo
from loadtests.scenarios.common import Contestant, Stage, check_answers, first_call, run_round
from loadtests.scenarios.relay import our_arms
from loadtests.serving import ours as serving

CALLS, TOKENS, CONCURRENCY = 24, 16, 8
LIMITS = Limits(call_s=30.0, run_s=60.0)
SLO = Slo(ttft_s=2.0, tpot_s=0.5)


async def play(stage: Stage) -> None:
    """Run a closed loop and a bursty open loop on every API."""
    options = stage.options
    tokens, concurrency = options.tokens or TOKENS, options.concurrency or CONCURRENCY
    stage.report.slo = SLO
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = f"sim://{model}?decode_ms=5&prefill_tokens_per_s=1000000&seed={options.seed}&{serving.plain_tokens(model)}"
    ours = await serving.start(stage.children, stage.folder, bundle=bundle, source=source)
    arms = our_arms(stage, ours)
    closed = fixed(CALLS, 24, tokens, options.seed)
    bursty = prefixes(CALLS, 3, 48, 8, tokens, options.seed)
    due_s = gamma(CALLS, 60.0, 2.0, options.seed)
    try:
        for arm in arms:
            if await first_call(arm, closed[0]):
                await run_round(arm, stage.screen, 1, closed, concurrency=concurrency, limits=LIMITS)
                await run_round(arm, stage.screen, 2, bursty, due_s=due_s, limits=LIMITS)
    finally:
        for arm in arms:
            await arm.face.close()
    check_answers(stage.report, arms)
    stage.report.figures += [_tokens_per_second(arm) for arm in arms]


def _tokens_per_second(arm: Contestant) -> Figure:
    name = f"tokens/s, {arm.arm.name}"
    rates = [run.tokens / run.duration_s for run in arm.runs if run.tokens]
    if not rates:
        return missing(name, None, arm.arm.problem or "no call was answered")
    return plain_figure(name, mean_of(rates), "tokens/s", None, len(rates))
