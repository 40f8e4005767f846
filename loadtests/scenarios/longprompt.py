"""Long prompts: calls with 220 KB of text and 16 output tokens each, at concurrency 50. The simulated engine has a
context of 131,072 tokens.

The engine's prefill takes no time, so the measurement shows the work before the prefill: reading, tokenizing and
forwarding. Both sides tokenize in threads: on our side the gateway, on the peer's side the server behind the peer.
No process is bound to cores.

The prompts are drawn from a hundred words, as in all load tests. This favours a tokenizer that encodes each
distinct word once. So the measurement is repeated with prose: Python's language reference, from a different
position for each prompt. The prose is a tenth shorter, since the test's small vocabulary needs more tokens for
prose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loadtests.datasets import prose, words
from loadtests.driver import Limits
from loadtests.faces import Request
from loadtests.figures import Bound, Figure, Interval, missing, plain_figure, ratio_figure
from loadtests.processes import SIMULATED
from loadtests.records import Run
from loadtests.report import Round
from loadtests.scenarios import relay
from loadtests.scenarios.common import Contestant, Stage, alternate, first_call, per_round, rounds_of
from loadtests.serving import ours as serving

PROMPT_BYTES, CONCURRENCY, CALLS, TOKENS = 220_000, 50, 100, 16
PROSE_BYTES = 195_000
LIMITS = Limits(call_s=120.0, run_s=180.0)
RATE = "requests/s with 220 KB prompts at concurrency 50, ours over gRPC against vllm-router"
STALL = "longest stall of the gateway's event loop meanwhile"
WITH_PROSE = ", prose"
PROSE_RATE = "requests/s with 195 KB of prose at concurrency 50, ours over gRPC against vllm-router"
PROSE_STALL = "longest stall of the gateway's event loop with prose"
RATE_BOUND, STALL_BOUND = Bound(">=", 1.5), Bound("<=", 20.0)


def requests_of(seed: int, number: int, tokens: int, calls: int = CALLS) -> list[Request]:
    """Return prompts that share no prefix."""
    return [
        Request(
            f"long-{seed}-{number}-{i}", f"{number}.{i} {words(f'{seed}/{number}/{i}', 54_000)}"[:PROMPT_BYTES], tokens
        )
        for i in range(calls)
    ]


def prose_requests(seed: int, number: int, tokens: int, calls: int = CALLS) -> list[Request]:
    """Return requests with prompts of prose. Each prompt begins at a different position in the text."""
    return [
        Request(
            f"prose-{seed}-{number}-{i}",
            f"{number}.{i} {prose(f'{seed}/{number}/{i}', PROSE_BYTES)}",
            tokens,
        )
        for i in range(calls)
    ]


def sim_source(model: Path, seed: int) -> str:
    """Return the model source of an engine with capacity for every prompt at once. A prefill takes a millisecond."""
    room = "max_model_len=131072&max_num_seqs=64&max_num_batched_tokens=16777216&kv_blocks=16384&block_size=1024"
    return f"sim://{model}?decode_ms=5&prefill_tokens_per_s=1e9&{room}&seed={seed}&{serving.plain_tokens(model)}"


async def play(stage: Stage) -> None:
    """Run the scenario: start our side and the peer's side, measure them in turns, and add the results to the
    report."""
    options, report = stage.options, stage.report
    concurrency, tokens, rounds = options.concurrency or CONCURRENCY, options.tokens or TOKENS, rounds_of(options)
    model, bundle = await serving.prepare(stage.children, "tokenizer", stage.folder)
    source = sim_source(model, options.seed)
    stalls = stage.folder / "stalls.json"
    ours = await serving.start(
        stage.children, stage.folder, bundle=bundle, source=source, name="long", kind=SIMULATED,
        witness=("--stalls", str(stalls)),
    )  # fmt: skip
    arms = relay.our_arms(stage, ours, (relay.GRPC,))

    async def stall(_: Run) -> dict[str, Any]:
        return {"event_loop": await serving.read_stalls(ours, stalls)}

    for arm in arms:
        arm.after = stall
    if options.selects(relay.ROUTER):
        _, port = await relay.start_sse_engine(stage, bundle, source)
        if (router := await relay.start_router(stage, port)) is not None:
            arms.append(router)
    report.settings |= {f"{stage.part}prompt_bytes": PROMPT_BYTES, f"{stage.part}concurrency": concurrency}
    prose_arms: list[Contestant] = []
    try:
        (short,) = requests_of(options.seed, 999, 1, 1)
        ready = [arm for arm in arms if await first_call(arm, short)]
        if arms[0] in ready:
            await serving.read_stalls(ours, stalls)  # discards the stalls of the gateway's start
        await alternate(
            stage, ready, lambda number: requests_of(options.seed, number, tokens),
            rounds=rounds, concurrency=concurrency, limits=LIMITS,
        )  # fmt: skip
        prose_arms = [_with_prose(stage, arm) for arm in ready]
        await alternate(
            stage, prose_arms, lambda number: prose_requests(options.seed, number, tokens),
            rounds=rounds, concurrency=concurrency, limits=LIMITS,
        )  # fmt: skip
    finally:
        for arm in arms:
            await arm.face.close()
    by_name = {arm.arm.name: arm for arm in (*arms, *prose_arms)}
    report.figures += figures(stage, by_name, "", RATE, STALL)
    report.figures += figures(stage, by_name, WITH_PROSE, PROSE_RATE, PROSE_STALL)


def _with_prose(stage: Stage, arm: Contestant) -> Contestant:
    """Add to the report an arm (a measured server) for the prompts made of prose, and return the arm. The new arm uses
    the same servers as `arm`."""
    name = arm.arm.name.removeprefix(stage.part)
    return Contestant(stage.arm(name + WITH_PROSE, arm.arm.description), arm.face, arm.roots, arm.after)


def figures(stage: Stage, arms: dict[str, Contestant], suffix: str, rate_name: str, stall_name: str) -> list[Figure]:
    """Return two rows of the report: the request rate of our gateway relative to the peer's, and the longest stall of
    our event loop. `rate_name`, `stall_name`: names of these rows. `suffix`: end of the names of the compared arms."""
    ours = arms.get(stage.part + relay.GRPC + suffix)
    router = arms.get(stage.part + relay.ROUTER + suffix)
    pairs = per_round(ours, router, _rate)
    rate = (
        ratio_figure(rate_name, *pairs, RATE_BOUND, difference_unit="requests/s")
        if pairs[0]
        else missing(rate_name, RATE_BOUND, "one of the two did not run")
    )
    worst_ms = [r.extra["event_loop"]["worst_s"] * 1000 for r in ours.arm.rounds] if ours else []
    if not worst_ms:
        return [rate, missing(stall_name, STALL_BOUND, "ours did not run")]
    note = "the worst of all rounds; low is the best round's worst"
    interval = Interval(max(worst_ms), min(worst_ms), max(worst_ms))
    return [rate, plain_figure(stall_name, interval, "ms", STALL_BOUND, len(worst_ms), note=note)]


def _rate(round_: Round) -> float | None:
    return len(round_.run.good) / round_.run.duration_s if round_.run.good else None
