"""`python -m loadtests.autoscale_live [--seconds 240] [--rounds 5] [--json FILE]`. Exit code 0 if no call failed.

Three parts run on one Ray. The first part measures cold starts from zero replicas. The starts are caused alternately by
an operator and by a call to the model. The second part compresses a day to minutes: the demand rises to 70 % of all
replicas, falls to a low level, and rises again. Streams are 5 to 60 s long, and the controller's own loop scales. The
same policy also gets the same calls in a simulation, with the measured start time and engine speed. The last part is a
day of changes (changes.py): the same demand with streams of 5 to 300 s. Meanwhile a canary is started and withdrawn,
the entry is changed, and a slow canary rolls itself back.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.api.types import ModelSpec
from cluster.policy.scaling.portfolio import ModelSettings, Slo
from cluster.policy.scaling.scaler import DECIDE_S
from loadtests import machine
from loadtests.autoscale_live.calls import MODEL, CallResult, compare, play
from loadtests.autoscale_live.changes import STREAM_S, Changes
from loadtests.autoscale_live.rig import SAMPLE_S, Live, Watch, running_test_bed
from loadtests.autoscale_live.traffic import Engine, PlannedCall, days, plan
from loadtests.sim.plant import ReplicaModel
from loadtests.sim.scaling import Demand, OurPolicy, SimModelSpec, simulate
from tests.support.checkpoints import build_checkpoint

SLO = Slo(ttft_s=2.0, itl_s=0.1, target=0.99)
ENGINE = Engine()
REPLICAS = 4
PROMPT_TOKENS = 30
MOST_TOKENS = 8192
"""Upper bound on the tokens of a stream. Streams of 300 s have 6,000 tokens."""
DAYS = 6
"""Upper bound on the number of days of changes. Changes take long, because an old version serves until its longest
stream has ended.
"""


async def run(seconds: float, changing_s: float, rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run all parts and return the figures by name. A part of zero length is left out."""
    checkpoint = build_checkpoint("llama", folder / "llama")
    spec = ModelSpec(
        MODEL,
        source_of(checkpoint),
        min_replicas=0,
        max_replicas=REPLICAS,
        max_model_len=MOST_TOKENS,
        idle_s=30.0,
        slo_ttft_s=SLO.ttft_s,
        slo_itl_s=SLO.itl_s,
        slo_target=SLO.target,
    )
    changing: dict[str, Any] = {"failed_or_cut": 0}
    async with running_test_bed(folder, checkpoint, spec) as live:
        zero = await _from_zero(live, rounds) if rounds else {"failed": 0}
        day = await _day(live, live.watch, seconds, seed) if seconds else {"failed_or_cut": 0}
        explanation = live.desk.explain(MODEL, 60)
        if changing_s:
            slow = source_of(checkpoint, prefill_tokens_per_s=ENGINE.prefill_tokens_per_s / 40)
            changing = await _changing(live, Changes(live.controller, live.settings, slow), changing_s, seed)
    decisions = [
        dataclasses.asdict(decision) | {"numbers": dict(decision.numbers)} for decision in explanation.decisions
    ]
    return {"machine": machine.hardware(), "from_zero": zero, "day": day, "changing": changing, "decisions": decisions}


def source_of(checkpoint: Path, *, prefill_tokens_per_s: float = ENGINE.prefill_tokens_per_s) -> str:
    """Return the model source of the simulated replica."""
    return (
        f"sim://{checkpoint}?decode_ms={ENGINE.decode_s * 1000:g}&max_num_seqs={ENGINE.max_num_seqs}"
        f"&prefill_tokens_per_s={prefill_tokens_per_s:g}&load_s={ENGINE.load_s:g}&max_model_len={MOST_TOKENS}"
    )


async def _from_zero(live: Live, rounds: int) -> dict[str, Any]:
    colds, calls = [], []
    await live.until_at_zero()
    await live.cold_start()  # the first start warms the machine's caches
    for number in range(rounds):
        colds.append(await live.cold_start())
        calls.append(await live.from_zero(number))
        print(
            f"round {number}: cold start {colds[-1]:.2f} s, from zero {calls[-1].first_s} {calls[-1].fault}", flush=True
        )
    firsts = [call.first_s for call in calls if call.first_s is not None]
    figures: dict[str, Any] = {
        "cold_starts_s": colds,
        "ttft_s": firsts,
        "failed": sum(bool(call.fault) for call in calls),
        "faults": [call.fault for call in calls if call.fault],
        "told_progress": sum(bool(call.progress) for call in calls),
    }
    if firsts:
        figures["ratio_of_medians"] = statistics.median(firsts) / statistics.median(colds)
    return figures


async def _day(live: Live, watch: Watch, seconds: float, seed: int) -> dict[str, Any]:
    calls = plan(seed, seconds, ENGINE, REPLICAS)
    print(f"{len(calls)} calls in {seconds:g} s", flush=True)
    began, load_before = time.monotonic(), os.getloadavg()
    results = await play(live.callers, calls)
    compare(results)
    ended = began + seconds
    faults = [result for result in results if result.fault]
    good = [_good(result) for result in results]
    cold_s = live.controller.scaler.scaling_of(MODEL).cold_start_s
    simulated = _simulated(calls, seconds, cold_s)
    gpu_s = watch.gpu_seconds(began, ended)
    return {
        "seconds": seconds,
        "calls": len(results),
        "failed_or_cut": len(faults),
        "faults": sorted({result.fault for result in faults}),
        "by_face": {face: sum(result.face == face for result in results) for face in ("sdk", "openai")},
        "resumed_streams": sum(bool(result.resumed) for result in results if result.face == "sdk"),
        "ttft_s": _quantiles([result.first_s for result in results if result.first_s is not None]),
        "attainment": sum(good) / len(good),
        "gpu_seconds": gpu_s,
        "simulated": simulated,
        "gpu_seconds_against_simulation": gpu_s / simulated["gpu_seconds"],
        "cold_start_s": cold_s,
        "load_average": [load_before[0], os.getloadavg()[0]],
        "replicas": [
            [round(at - began, 2), running, starting, desired]
            for at, running, starting, desired in watch.samples[:: round(1 / SAMPLE_S)]
            if at >= began
        ],
    }


async def _changing(live: Live, track: Changes, seconds: float, seed: int) -> dict[str, Any]:
    calls = days(seed + 1, DAYS, seconds, ENGINE, REPLICAS, stream_s=STREAM_S)
    print(f"changes, with calls until they are complete, at most {DAYS * seconds:g} s", flush=True)
    beside = asyncio.create_task(track.play(seconds))
    try:
        results = await play(live.callers, calls, beside)
        await beside
    finally:
        beside.cancel()
    compare(results)
    faults = [result for result in results if result.fault]
    return {
        "seconds": seconds,
        "streams_s": list(STREAM_S),
        "calls": len(results),
        "failed_or_cut": len(faults),
        "faults": sorted({result.fault for result in faults})[:10],
        "by_face": {face: sum(result.face == face for result in results) for face in ("sdk", "openai")},
        "resumed_streams": sum(bool(result.resumed) for result in results if result.face == "sdk"),
        "ttft_s": _quantiles([result.first_s for result in results if result.first_s is not None]),
        "changes": track.completed,
    }


def _good(result: CallResult) -> bool:
    late = result.first_s is None or result.first_s > SLO.ttft_s
    return not result.fault and not late and result.mean_gap_s <= SLO.itl_s


def _simulated(calls: Sequence[PlannedCall], seconds: float, cold_s: float) -> dict[str, Any]:
    """Simulate these calls with the scaling policy of the live run, at the decision interval of the live run. Return
    the figures."""
    demand = Demand(
        at_s=np.array([call.at_s for call in calls]),
        count=np.ones(len(calls)),
        prompt_tokens=np.full(len(calls), float(PROMPT_TOKENS)),
        output_tokens=np.array([float(call.tokens) for call in calls]),
        duration_s=seconds,
        runs_to_most=True,
    )
    plant = ReplicaModel(
        prefill_tokens_per_s=ENGINE.prefill_tokens_per_s,
        step_s=ENGINE.decode_s,
        per_sequence_s=1e-6,
        chunk_tokens=2048,
        max_running=ENGINE.max_num_seqs,
        kv_tokens=65_536,
    )
    settings = ModelSettings(0, REPLICAS, 30.0, SLO, cold_start_s=cold_s)
    specs = {MODEL: SimModelSpec(demand, settings, plant, initial=0)}
    track = simulate(specs, OurPolicy(), cold_start_s=cold_s, every_s=DECIDE_S, tick_s=0.05)[MODEL]
    return {"gpu_seconds": track.gpu_s, "attainment": track.attainment, "starts": track.starts, "downs": track.downs}


def _quantiles(values: Sequence[float]) -> Mapping[str, float]:
    if not values:
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99, 100)}


def main() -> int:
    """Run all parts and report the figures."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.autoscale_live")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--changing", type=float, default=300.0, metavar="SECONDS", help="the day of changes (0: none)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(run(given.seconds, given.changing, given.rounds, given.seed, Path(folder)))
    text = json.dumps(figures, indent=1)
    if given.json is not None:
        given.json.write_text(text)
    day = {key: value for key, value in figures["day"].items() if key != "replicas"}
    print(json.dumps({"from_zero": figures["from_zero"], "day": day, "changing": figures["changing"]}, indent=1))
    bad = figures["from_zero"]["failed"] or figures["day"]["failed_or_cut"] or figures["changing"]["failed_or_cut"]
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
