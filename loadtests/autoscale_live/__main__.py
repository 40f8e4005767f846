"""`python -m loadtests.autoscale_live [--seconds 240] [--rounds 5] [--json FILE]`. Exit code 0 when no call failed.

Two parts on one Ray. First rounds from zero: the start of the model by hand, and a call that finds it at zero, by
turns. Then a day in minutes: the demand rises to 70 % of all replicas, falls to little, and rises again, streams are
5 to 60 s long, and the controller's own loop scales. The same calls are played to the same policy in simulation, with
the start's length and the engine's speed as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cluster.api.types import ModelSpec
from cluster.control.catalog import Known
from cluster.control.reconcile import Observed
from cluster.control.scaler import DECIDE_S, OnRay, Scaler, ScalingSettings
from cluster.control.scaling import ModelSettings, Slo
from cluster.control.scaling_desk import Desk
from cluster.link.controller import ControllerEnd
from cluster.rayserve import scaling
from cluster.rayserve.backend import ChildBackend
from cluster.rayserve.controller import Controller
from cluster.rayserve.local import LocalRay, LocalRaySettings
from cluster.rayserve.settings import ReplicaSettings
from cluster.sim.plant import ReplicaModel
from cluster.sim.scaling import Demand, OurPolicy, SimModelSpec, simulate
from loadtests import machine
from loadtests.autoscale_live.calls import Callers, Told, compare, play
from loadtests.autoscale_live.traffic import Engine, PlannedCall, plan
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, running_cluster, until

SLO = Slo(ttft_s=2.0, itl_s=0.1, target=0.99)
ENGINE = Engine()
REPLICAS = 4
SAMPLE_S = 0.25
PROMPT_TOKENS = 30


class Watch:
    """The fleet over time: replicas that start or serve, and those that leave."""

    def __init__(self, scaler: Scaler) -> None:
        self._scaler = scaler
        self.samples: list[tuple[float, int, int, int]] = []

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            one = self._scaler.standing("sim")
            self.samples.append((time.monotonic(), one.running, one.starting, one.desired))
            await asyncio.sleep(SAMPLE_S)

    def gpu_seconds(self, since: float, until_: float) -> float:
        """Of replicas that start or serve."""
        inside = [one for one in self.samples if since <= one[0] <= until_]
        return sum((b[0] - a[0]) * (a[1] + a[2]) for a, b in itertools.pairwise(inside))


class Live:
    """The parts of a run."""

    def __init__(self, controller: Controller, desk: Desk, callers: Callers, links: Any, spec: ModelSpec) -> None:
        self.controller, self.desk, self.callers, self.links, self.spec = controller, desk, callers, links, spec

    async def at_zero(self) -> None:
        """Wait until nothing of the model is left but its name."""
        await until(lambda: self.links() == 0, "no replica is linked", 120)
        await self.on_ray(lambda app: not (app.leaving or app.running or app.placed))

    async def on_ray(self, holds: Callable[[Observed], bool]) -> None:
        """Wait until Ray says so of the model."""
        deadline = time.monotonic() + 120
        while not [one for one in (await self._apps()) if holds(one)]:
            if time.monotonic() > deadline:
                raise TimeoutError("Ray does not come to rest")
            await asyncio.sleep(0.2)

    async def _apps(self) -> Sequence[Observed]:
        snapshot = await self.controller.backend.observe()
        return [one for one in snapshot.apps.values() if one.model == self.spec.name and not one.deleting]

    async def cold_start(self) -> float:
        """By hand: from the word to a worker with room."""
        began = time.monotonic()
        self.desk.scale("sim", 1)
        await until(lambda: self.links() == 1, "it serves", 120)
        took_s = time.monotonic() - began
        self.desk.scale("sim", 0)
        await self.at_zero()
        self.desk.scale("sim", None)
        return took_s

    async def from_zero(self, number: int) -> Told:
        """A call that finds the model at zero; then back there."""
        told = await self.callers.call(PlannedCall(0.0, 20, number % 2, 0))
        self.desk.scale("sim", 0)
        await self.at_zero()
        self.desk.scale("sim", None)
        return told


async def run(seconds: float, rounds: int, seed: int, folder: Path) -> dict[str, Any]:
    """The whole of it; figures by name."""
    checkpoint = build_checkpoint("llama", folder / "llama")
    bundle = bundle_of(checkpoint)
    ray = LocalRay(LocalRaySettings(f"live-{uuid.uuid4().hex[:8]}", Path(tempfile.mkdtemp(prefix="hr-"))))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, ray.log_file.parent, ignore_errors=True)
        stack.callback(ray.stop)
        await asyncio.to_thread(ray.start)
        backend = ChildBackend("live", ray.address, ray.environment(), ray.log_file.parent / "driver.log")
        stack.push_async_callback(backend.close)
        cluster = await stack.enter_async_context(running_cluster(folder / "gateway"))
        ends = cluster.gateway.endpoints
        end = ControllerEnd(controller_id="live", gateways=[ends["link"]], tls=None, bundles=lambda _: bundle)
        scaler = Scaler(ScalingSettings(cold_start_s=10.0), time.monotonic())
        controller = Controller(backend, end, scaler=scaler)
        controller.known["sim"] = Known(bundle_digest=bundle.digest, max_model_len=2048)
        scaling.listen(end, scaler, controller.now, controller.wake)
        source = (
            f"sim://{checkpoint}?decode_ms={ENGINE.decode_s * 1000:g}&max_num_seqs={ENGINE.max_num_seqs}"
            f"&prefill_tokens_per_s={ENGINE.prefill_tokens_per_s:g}&load_s={ENGINE.load_s:g}"
        )
        spec = ModelSpec(
            "sim",
            source,
            min_replicas=0,
            max_replicas=REPLICAS,
            idle_s=30.0,
            slo_ttft_s=SLO.ttft_s,
            slo_itl_s=SLO.itl_s,
            slo_target=SLO.target,
        )
        scaler.look([spec], {("sim", ""): OnRay(0)}, [], time.monotonic(), time.time(), blind=True)
        controller.want([ReplicaSettings(spec, "live", gateways=(ends["link"],), drain_timeout_s=10.0)])
        watch = Watch(scaler)
        parts = [asyncio.create_task(one) for one in (end.run(), controller.run(), watch.run())]
        callers = Callers(ends["grpc"], ends["http"])
        stack.push_async_callback(callers.close)
        live = Live(controller, Desk(scaler, controller.wake), callers, lambda: len(cluster.gateway.hub.links), spec)
        try:
            await live.on_ray(lambda app: bool(app.digest))
            zero = await _from_zero(live, rounds)
            day = await _day(live, watch, seconds, seed)
            story = live.desk.explain("sim", 60)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await asyncio.wait_for(backend.shutdown(), 30)
    decisions = [dataclasses.asdict(one) | {"numbers": dict(one.numbers)} for one in story.decisions]
    return {"machine": machine.hardware(), "from_zero": zero, "day": day, "decisions": decisions}


async def _from_zero(live: Live, rounds: int) -> dict[str, Any]:
    colds, calls = [], []
    await live.at_zero()
    await live.cold_start()  # the first one warms the machine's own caches
    for number in range(rounds):
        colds.append(await live.cold_start())
        calls.append(await live.from_zero(number))
        print(
            f"round {number}: cold start {colds[-1]:.2f} s, from zero {calls[-1].first_s} {calls[-1].fault}", flush=True
        )
    firsts = [one.first_s for one in calls if one.first_s is not None]
    found: dict[str, Any] = {
        "cold_starts_s": colds,
        "ttft_s": firsts,
        "failed": sum(bool(one.fault) for one in calls),
        "faults": [one.fault for one in calls if one.fault],
        "told_progress": sum(bool(one.progress) for one in calls),
    }
    if firsts:
        found["ratio_of_medians"] = statistics.median(firsts) / statistics.median(colds)
    return found


async def _day(live: Live, watch: Watch, seconds: float, seed: int) -> dict[str, Any]:
    calls = plan(seed, seconds, ENGINE, REPLICAS)
    print(f"{len(calls)} calls in {seconds:g} s", flush=True)
    began, load_before = time.monotonic(), os.getloadavg()
    told = await play(live.callers, calls)
    compare(told)
    ended = began + seconds
    faults = [one for one in told if one.fault]
    good = [_good(one) for one in told]
    cold_s = live.controller.scaler.standing("sim").cold_start_s
    simulated = _simulated(calls, seconds, cold_s)
    gpu_s = watch.gpu_seconds(began, ended)
    return {
        "seconds": seconds,
        "calls": len(told),
        "failed_or_cut": len(faults),
        "faults": sorted({one.fault for one in faults}),
        "by_face": {face: sum(one.face == face for one in told) for face in ("sdk", "openai")},
        "resumed_streams": sum(bool(one.resumed) for one in told if one.face == "sdk"),
        "ttft_s": _quantiles([one.first_s for one in told if one.first_s is not None]),
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


def _good(one: Told) -> bool:
    late = one.first_s is None or one.first_s > SLO.ttft_s
    return not one.fault and not late and one.mean_gap_s <= SLO.itl_s


def _simulated(calls: Sequence[PlannedCall], seconds: float, cold_s: float) -> dict[str, Any]:
    """The same calls and the same policy, decided as often."""
    demand = Demand(
        at_s=np.array([one.at_s for one in calls]),
        count=np.ones(len(calls)),
        prompt_tokens=np.full(len(calls), float(PROMPT_TOKENS)),
        output_tokens=np.array([float(one.tokens) for one in calls]),
        duration_s=seconds,
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
    specs = {"sim": SimModelSpec(demand, settings, plant, initial=0)}
    track = simulate(specs, OurPolicy(), cold_start_s=cold_s, every_s=DECIDE_S, tick_s=0.05)["sim"]
    return {"gpu_seconds": track.gpu_s, "attainment": track.attainment, "starts": track.starts, "downs": track.downs}


def _quantiles(values: Sequence[float]) -> Mapping[str, float]:
    if not values:
        return {}
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99, 100)}


def main() -> int:
    """Run and tell."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.autoscale_live")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(given.seconds, given.rounds, given.seed, Path(folder)))
    text = json.dumps(found, indent=1)
    if given.json is not None:
        given.json.write_text(text)
    day = {key: value for key, value in found["day"].items() if key != "replicas"}
    print(json.dumps({"from_zero": found["from_zero"], "day": day}, indent=1))
    return int(bool(found["from_zero"]["failed"] or found["day"]["failed_or_cut"]))


if __name__ == "__main__":
    sys.exit(main())
