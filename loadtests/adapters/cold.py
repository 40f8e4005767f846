"""The part `cold`: time to first token of calls whose adapter must be loaded first.

An engine with 8 slots and memory for 64 adapters gets calls for 200 adapters, distributed by Zipf's law. A call is cold
if its adapter is not among the 64 different adapters that were called last, because the worker drops the adapter that
was used least recently. The time to load an adapter is measured first, while no other call runs: the longest time to
first token of 20 cold calls, less the median time to first token of calls to a loaded adapter.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cluster.api.adapters import full_name
from loadtests.adapters import rig
from loadtests.arrivals import gamma
from loadtests.datasets import prose
from loadtests.driver import Limits, drive
from loadtests.faces.base import Request
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.figures import Bound, Figure
from loadtests.records import Record
from loadtests.scenarios.common import Contestant, Stage, first_call, run_round
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

ADAPTERS, SLOTS, MEMORY, CALLS, TOKENS, RATE, LOADS = 200, 8, 64, 1_500, 8, 12.0, 20
TITLE = "TTFT p99 of calls with a cold adapter, against 1.5 x warm p99 plus the time to load"
FAILED = "calls for cold and warm adapters that failed"
BOUND, NONE = Bound("<=", 1.0), Bound("<=", 0.0)
ROWS: Mapping[str, Bound | None] = {TITLE: BOUND, FAILED: NONE}
ENGINE: Mapping[str, object] = {"max_loras": SLOTS, "max_cpu_loras": MEMORY}
LIMITS = Limits(call_s=120.0, run_s=400.0)


def zipf(count: int, seed: int) -> list[int]:
    """Draw the adapter of each of `count` calls, as a number. The probability of adapter n is proportional to 1 / (n +
    1)."""
    weights = [1 / (number + 1) for number in range(ADAPTERS)]
    return random.Random(seed).choices(range(ADAPTERS), weights, k=count)


def cold(adapters: Iterable[int], memory: int = MEMORY) -> list[bool]:
    """Return for each call whether it is cold. A call is cold if its adapter is not one of the last `memory` different
    adapters that were called before. `adapters`: the adapter of each call, in order."""
    recent: dict[int, None] = {}
    out = []
    for adapter in adapters:
        out.append(adapter not in recent)
        recent.pop(adapter, None)
        recent[adapter] = None
        if len(recent) > memory:
            del recent[next(iter(recent))]
    return out


def request(key: str, adapter: int) -> Request:
    """Return a call for an adapter."""
    return Request(key, prose(f"cold/{key}", 80), TOKENS, model=full_name(serving.MODEL, f"a{adapter}"))


async def measure(stage: Stage) -> list[Figure]:
    """Measure how long an adapter takes to load, and then the latency of calls for 200 adapters. Return the report's
    rows. Raises DidNotStart."""
    folder = await rig.prepare(stage, ADAPTERS)
    async with rig.running(stage, folder, rig.names(ADAPTERS), ENGINE) as ours:
        arm = Contestant(
            stage.arm("ours", f"{ADAPTERS} adapters, {SLOTS} slots, memory for {MEMORY}"),
            OpenAiSse(ours.http, serving.MODEL, api_key=ours.key), ours.roots,
        )  # fmt: skip
        try:
            await first_call(arm, request("first", 0))
            load_s = await _load_s(arm)
            called = zipf(CALLS, stage.options.seed)
            calls = [request(str(number), adapter) for number, adapter in enumerate(called)]
            due_s = gamma(CALLS, RATE, 1.0, stage.options.seed)
            run = await run_round(arm, stage.screen, 1, calls, due_s=due_s, limits=LIMITS)
        finally:
            await arm.face.close()
    by_key = {record.key: record for record in run.records}
    records = [by_key[call.key] for call in calls if call.key in by_key]
    was_cold = dict(zip((call.key for call in calls), cold(called), strict=True))
    colds = [record for record in records if was_cold[record.key]]
    warm_s, cold_s = p99_s([record for record in records if not was_cold[record.key]]), p99_s(colds)
    note = f"{len(colds)} cold calls, p99 {cold_s * 1e3:.0f} ms; warm {warm_s * 1e3:.0f} ms; load {load_s * 1e3:.0f} ms"
    failed = CALLS - sum(record.ok for record in records)
    return [exact(TITLE, cold_s / (1.5 * warm_s + load_s), BOUND, note=note), exact(FAILED, failed, NONE)]


async def _load_s(arm: Contestant) -> float:
    """Return the time to load an adapter, in seconds. Only the least popular adapters are loaded, so that no popular
    adapter is loaded when the mix of calls begins."""
    numbers = [ADAPTERS - 1 - number for number in range(LOADS + MEMORY)]
    requests = [request(f"load/{number}", number) for number in numbers]
    loads = await drive(arm.face, requests, concurrency=1, limits=LIMITS)
    repeated = [request(f"warm/{number}", numbers[-1]) for number in range(LOADS)]
    warm = await drive(arm.face, repeated, concurrency=1, limits=LIMITS)
    return max(ttfts(loads.good[-LOADS:])) - float(np.median(ttfts(warm.good)))


def ttfts(records: Sequence[Record]) -> list[float]:
    """Return the times to first token of calls, in seconds."""
    return [record.ttft_s for record in records if record.ttft_s is not None]


def p99_s(records: Sequence[Record]) -> float:
    """Return the 99th percentile of the time to first token, in seconds."""
    return float(np.percentile(ttfts(records), 99))
