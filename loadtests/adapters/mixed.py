"""The part `mixed`: throughput with a mix of adapters relative to one adapter, compared with vLLM's own server.

There are 32 concurrent callers, and each call has 64 tokens. In the mixed rounds the calls name eight adapters in turn;
in the other rounds all calls name the same adapter. Headrace's worker and vLLM's server have the same engine with eight
slots, so that every adapter keeps its slot. The ratio of the mixed to the single-adapter throughput is computed for
Headrace and for vLLM's server, and the two ratios are compared.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.api.adapters import full_name
from loadtests.adapters import rig
from loadtests.agents.tool_tokens import bind
from loadtests.datasets import prose
from loadtests.driver import Limits
from loadtests.faces.base import Request
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.figures import Bound, Figure, missing, ratio_figure
from loadtests.report import Round
from loadtests.scenarios.common import Contestant, Stage, first_call, per_round, rounds_of, run_round
from loadtests.serving import ours as serving

ADAPTERS, CALLERS, CALLS, TOKENS, PROMPT_CHARS = 8, 32, 384, 64, 120
TITLE = "throughput of 8 adapters mixed against one, as a share of that of vLLM's server"
BOUND = Bound(">=", 0.95)
ROWS: Mapping[str, Bound | None] = {TITLE: BOUND}
ENGINE: Mapping[str, object] = {"max_loras": ADAPTERS, "max_cpu_loras": ADAPTERS}
LIMITS = Limits(call_s=120.0, run_s=300.0)


def requests(round_: int, adapters: int) -> list[Request]:
    """Return the calls of one round. The calls name `adapters` different adapters in turn."""
    return [
        Request(
            f"{round_}/{adapters}/{number}", prose(f"mixed/{round_}/{number}", PROMPT_CHARS), TOKENS,
            model=full_name(serving.MODEL, f"a{number % adapters}"),
        )
        for number in range(CALLS)
    ]  # fmt: skip


async def measure(stage: Stage) -> list[Figure]:
    """Measure each server with one and with eight adapters; return the report's row. Raises DidNotStart."""
    folder = await rig.prepare(stage, ADAPTERS)
    server = await rig.start_server(stage, folder, ADAPTERS, ENGINE)
    async with rig.running(stage, folder, rig.names(ADAPTERS), ENGINE) as ours:
        arms: dict[tuple[str, int], Contestant] = {}
        for adapters in (ADAPTERS, 1):
            arms["ours", adapters] = Contestant(
                stage.arm(f"ours, {adapters} adapters", "the gateway with its worker, over HTTP"),
                OpenAiSse(ours.http, serving.MODEL, api_key=ours.key), ours.roots,
            )  # fmt: skip
            arms["vllm", adapters] = Contestant(
                stage.arm(f"vLLM server, {adapters} adapters", "vLLM's own server"),
                OpenAiSse(server.url, serving.MODEL), [(server.child.pid, server.child.kind)],
            )  # fmt: skip
        stage.report.settings["mixed"] = {"callers": CALLERS, "cores": bind(stage, list(arms.values()))}
        try:
            await _play(stage, arms)
        finally:
            for arm in arms.values():
                await arm.face.close()
    return [figure(arms)]


async def _play(stage: Stage, arms: Mapping[tuple[str, int], Contestant]) -> None:
    """Warm up each measured server (an arm), then run all arms in every round. Every second round has the opposite
    order. `arms`: by server and number of adapters in its calls. Each server is measured with one adapter and with
    eight."""
    for key, arm in arms.items():
        if await first_call(arm, requests(0, key[1])[0]):
            await run_round(arm, stage.screen, 0, requests(0, key[1]), concurrency=CALLERS, limits=LIMITS, keep=False)
    for number in range(1, rounds_of(stage.options) + 1):
        for key in list(arms) if number % 2 else reversed(list(arms)):
            if not arms[key].arm.problem:
                await run_round(
                    arms[key], stage.screen, number, requests(number, key[1]), concurrency=CALLERS, limits=LIMITS
                )  # fmt: skip


def throughput(round_: Round) -> float | None:
    """Return the tokens a second of a round."""
    ended = [record.ended_s for record in round_.run.good]
    return round_.run.tokens / max(ended) if ended else None


def figure(arms: Mapping[tuple[str, int], Contestant]) -> Figure:
    """Return the report's row, which compares one ratio: the throughput with mixed adapters divided by the throughput
    with one adapter. The row's value is our ratio divided by the ratio of vLLM's server."""
    problems = (f"{arm.arm.name}: {arm.arm.problem}" for arm in arms.values() if arm.arm.problem)
    if problem := next(problems, ""):
        return missing(TITLE, BOUND, problem)
    ours, theirs = (
        [mixed / one for mixed, one in zip(*per_round(arms[side, ADAPTERS], arms[side, 1], throughput), strict=True)]
        for side in ("ours", "vllm")
    )
    means = [sum(side) / max(len(side), 1) for side in (ours, theirs)]
    note = f"mixed against one: ours {means[0]:.2f}, vLLM's server {means[1]:.2f}"
    return ratio_figure(TITLE, ours, theirs, BOUND, note=note)
