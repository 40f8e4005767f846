"""Fairness between tenants: the largest difference in service between two tenants, the tenants' shares, the time to
first token of a quiet tenant beside a loud one, and the time that the fair queue takes.

Eight simulated workers and one, two or eight gateways run in virtual time, in the simulator of loadtests/sim. Waiting
room, fair queue, credits, accounts and routing are the production code. Reports arrive 100 ms late. The lengths of the
tenants' calls are from public traces, or synthetic if the traces are absent. Only the time of the fair queue is
measured in real time.

With `--adapters SHARE`, this share of the calls names one of 64 adapters. A worker's engine holds eight adapters at a
time.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster.policy.fairness.fair_queue import FairOrders
from cluster.policy.fairness.waiting_room import WaitingRoom, WaitingSequence
from loadtests import traces
from loadtests.figures import Bound, mean, missing, plain_figure, ratio_figure
from loadtests.scenarios.common import Stage, rounds_of
from loadtests.sim.adapters import AdapterMix
from loadtests.sim.traffic import Lengths, SimTenant, clipped, made_up
from loadtests.sim.world import World, WorldConfig

WORLD_S, QUIET_S, SETTLE_S = 60.0, 60.0, 5.0
GATEWAYS = (1, 2, 8)
QUEUED, OPERATIONS, LIVE = 100_000, 20_000, 256
FEW, MANY = 10, 10_000
GAP = "largest gap in weighted service between two always-backlogged tenants, in U"
SHARE = "least share of a backlogged tenant against its weight, in any 30 s"
QUIET = "p99 TTFT of a quiet tenant beside one that sends 100x its share, against alone"
QUIET_FIFO = QUIET + ", first come first served"
BESIDE = "total throughput of these two against FIFO, with places kept for the quiet one"
THROUGHPUT, HITS = "total throughput against FIFO", "prefix hit rate against FIFO"
TURN = "enqueue and pick, 10,000 tenants and 100,000 queued, p99"
TURN_RATIO = "the same, against 10 tenants"
PEERS = "the peers scenario with all of this on"


@dataclass(frozen=True, slots=True)
class Crowd:
    """Results of one simulation in which all tenants always have calls waiting. `gap`: largest fairness gap between two
    tenants, in units of U (see Observer.unit)."""

    gap: float
    share: float
    throughput: float
    hit_rate: float
    engine_waiting: int
    beside_room_s: float
    promised_over_room: int


@dataclass(frozen=True, slots=True)
class QuietTenant:
    """Result of a run: the p99 time to first token of a quiet tenant in seconds, and the throughput of the cluster in
    weighted tokens a second."""

    ttft_s: float
    throughput: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of one enqueue and one pick together, as the p99 in µs: with few tenants and with many."""

    few_us: float
    many_us: float


async def play(stage: Stage) -> None:
    """Run all simulations of the scenario. Each round has its own seed."""
    rounds, seed, mix = rounds_of(stage.options), stage.options.seed, stage.options.adapter_mix
    if not from_traces():
        stage.screen.say(f"no recorded traces in {traces.DEFAULT_FOLDER}: using similar synthetic lengths")
    costs = []
    for number in range(1, rounds + 1):
        costs.append(Cost(turn_us(FEW, seed + number), turn_us(MANY, seed + number)))
    stage.screen.say(f"a turn: {costs[-1].few_us:.1f} us of 10 tenants, {costs[-1].many_us:.1f} us of 10,000")
    seeds = [seed + number for number in range(rounds)]
    loop = asyncio.get_running_loop()
    cores = max(min(len(os.sched_getaffinity(0)), 8), 1)
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        fair = {g: [loop.run_in_executor(pool, crowd, s, g, True, mix) for s in seeds] for g in GATEWAYS}
        fifo = [loop.run_in_executor(pool, crowd, s, 2, False, mix) for s in seeds]
        quiet = [loop.run_in_executor(pool, quiet_ttft, s, mix) for s in seeds]
        everything: list[asyncio.Future[Any]] = [*fifo, *quiet, *(run for runs in fair.values() for run in runs)]
        for number, done in enumerate(asyncio.as_completed(everything), 1):
            await done
            if number % rounds == 0:
                stage.screen.say(f"{number} of {len(everything)} worlds have been run")
        crowds = {g: list(await asyncio.gather(*runs)) for g, runs in fair.items()}
        others, ttfts = list(await asyncio.gather(*fifo)), list(await asyncio.gather(*quiet))
    stage.report.settings |= {
        "virtual_s": WORLD_S,
        "workers": 8,
        "seeds": seeds,
        "traces": from_traces(),
        "adapters": repr(mix),
        "crowds": {str(g): [repr(result) for result in runs] for g, runs in crowds.items()},
        "fifo": [repr(result) for result in others],
        "quiet (alone, fair, fifo)": [repr(result) for result in ttfts],
        "turn_us (10 tenants, 10,000)": [(c.few_us, c.many_us) for c in costs],
    }
    if any(result.promised_over_room > 0 for runs in crowds.values() for result in runs):
        stage.report.problems.append("credits exceeded a worker's room")
    add_figures(stage, crowds, others, ttfts, costs)


def add_figures(
    stage: Stage,
    crowds: dict[int, list[Crowd]],
    fifo: Sequence[Crowd],
    ttfts: Sequence[tuple[QuietTenant, QuietTenant, QuietTenant]],
    costs: Sequence[Cost],
) -> None:
    """Add the scenario's rows to the report."""
    two, rounds = crowds[2], len(fifo)
    gap_of_fifo = sum(result.gap for result in fifo) / rounds
    share_of_fifo = sum(result.share for result in fifo) / rounds
    figures = stage.report.figures

    def plain(name: str, values: Sequence[float], unit: str, bound: Bound, note: str = "") -> None:
        figures.append(plain_figure(name, mean(values), unit, bound, len(values), note=note))

    plain(GAP, [o.gap for o in two], "U", Bound("<=", 1.0), f"2 gateways; FIFO in the same run {gap_of_fifo:.1f}")
    plain(SHARE, [o.share for o in two], "ratio", Bound(">=", 0.9), f"2 gateways; FIFO {share_of_fifo:.2f}")
    alone, fair, first = ([t[i].ttft_s for t in ttfts] for i in range(3))
    figures.append(ratio_figure(QUIET, fair, alone, Bound("<=", 1.2), scale=1000, difference_unit="ms"))
    figures.append(ratio_figure(QUIET_FIFO, first, alone, Bound(">=", 10), scale=1000, difference_unit="ms"))
    served, by_fifo = ([t[i].throughput for t in ttfts] for i in (1, 2))
    figures.append(ratio_figure(BESIDE, served, by_fifo, Bound(">=", 0.98)))
    figures.append(
        ratio_figure(THROUGHPUT, [o.throughput for o in two], [o.throughput for o in fifo], Bound(">=", 0.98))
    )
    figures.append(ratio_figure(HITS, [o.hit_rate for o in two], [o.hit_rate for o in fifo], Bound(">=", 0.95)))
    for g, runs in crowds.items():
        note = f"gap {max(o.gap for o in runs):.2f} U, share {min(o.share for o in runs):.2f} at worst"
        plain(f"engine's own waiting queue, {g} gateways", [o.engine_waiting for o in runs], "calls", Bound("<=", 2))
        waits = [o.beside_room_s * 1000 for o in runs]
        plain(f"longest wait beside free room, {g} gateways", waits, "ms", Bound("<=", 200), note)
    plain(TURN, [c.many_us for c in costs], "us", Bound("<=", 20), "on the clock, one thread")
    figures.append(ratio_figure(TURN_RATIO, [c.many_us for c in costs], [c.few_us for c in costs], Bound("<=", 1.5)))
    figures.append(missing(PEERS, None, "measured by the scenario peers, with tenants and limits configured"))


# ---- worlds


def lengths(name: str, seed: int, longest: bool = False) -> list[Lengths]:
    """Return the lengths of a trace, or similar synthetic lengths if the traces are absent."""
    try:
        pairs = [(t.prompt_tokens, t.output_tokens) for t in traces.load(name)]
    except traces.NoData:
        medians = {"azure-code": (1500, 12), "azure-conv": (1000, 130), "vtc": (40, 190)}
        prompt, output = medians[name]
        return made_up(random.Random(seed), prompt, output * (3 if longest else 1))
    return clipped([pair for pair in pairs if not longest or pair[1] >= 300])


def from_traces() -> bool:
    """Return whether the lengths come from recorded traces."""
    try:
        return bool(traces.load("vtc"))
    except traces.NoData:
        return False


def tenants(seed: int) -> list[SimTenant]:
    """Return twelve tenants. They have short, medium and long outputs and the weights 1 and 2. Half of them use only
    one gateway."""
    kinds = (
        ("code", lengths("azure-code", seed)),
        ("chat", lengths("azure-conv", seed)),
        ("long", lengths("azure-conv", seed, longest=True)),
    )
    return [
        SimTenant(f"{name}-{i}", kind_lengths, backlog=20, weight=1 + i % 2, gateways=None if i < 2 else (i,))
        for name, kind_lengths in kinds
        for i in range(4)
    ]


def crowd(seed: int, gateways: int, fair: bool, adapters: AdapterMix | None = None) -> Crowd:
    """Run a simulation in which every tenant always has calls waiting; return the results."""
    population = tenants(seed)
    weights = {tenant.name: tenant.weight for tenant in population}
    world = World(WorldConfig(population, gateways=gateways, fair=fair, seed=seed, adapters=adapters)).run(WORLD_S)
    observer = world.observer
    return Crowd(
        gap=observer.largest_gap(list(weights), weights, 0.0) / observer.unit(),
        share=observer.smallest_share(list(weights), weights, 0.0),
        throughput=observer.throughput(SETTLE_S),
        hit_rate=observer.hit_rate(),
        engine_waiting=max(worker.most_waiting for worker in world.workers),
        beside_room_s=observer.longest_beside_room_s,
        promised_over_room=observer.most_promised_over_room,
    )


def quiet_ttft(seed: int, adapters: AdapterMix | None = None) -> tuple[QuietTenant, QuietTenant, QuietTenant]:
    """Return the results of a quiet tenant in three runs: alone; with a loud tenant, in fair order; with the loud
    tenant, first come first served."""
    quiet = SimTenant("quiet", lengths("azure-conv", seed), rate_s=5.0)
    loud = SimTenant("loud", lengths("vtc", seed), backlog=1000)
    out = []
    for population, fair in (([quiet], True), ([quiet, loud], True), ([quiet, loud], False)):
        config = WorldConfig(population, fair=fair, seed=seed, adapters=adapters)
        config = replace(config, engine=replace(config.engine, max_num_seqs=64))
        observer = World(config).run(QUIET_S).observer
        out.append(QuietTenant(observer.ttft("quiet", 0.99, SETTLE_S), observer.throughput(SETTLE_S)))
    return out[0], out[1], out[2]


# ---- real time


def turn_us(count: int, seed: int) -> float:
    """Return the p99 time in µs of one enqueue followed by one pick, while QUEUED sequences of `count` tenants wait."""
    rng = random.Random(seed)
    turns = FairOrders()
    room = WaitingRoom(max_requests=10**6, max_tokens=10**12, max_wait_s=1e9, order_of=turns.order)
    names = [f"tenant-{number}" for number in range(count)]

    def waiting_sequence(number: int) -> WaitingSequence:
        tokens, output = rng.randrange(100, 2000), rng.randrange(20, 500)
        return WaitingSequence(str(number), "m", rng.choice(names), tokens, None, "standard", 0.0, 0, 0, output)

    for number in range(QUEUED):
        room.admit(waiting_sequence(number), 0.0)
    newcomers = [waiting_sequence(QUEUED + number) for number in range(OPERATIONS)]
    order, live, times = turns.order("m"), list[str](), list[int]()
    gc.collect()
    gc.disable()
    try:
        for waiting in newcomers:
            began = time.perf_counter_ns()
            room.admit(waiting, 1.0)
            taken = room.pop_next("m", lambda _: True, 1.0)
            times.append(time.perf_counter_ns() - began)
            if taken is not None:
                live.append(taken.call_id)
            if len(live) > LIVE:  # calls end, and unused predicted service is given back
                call_id = live.pop(rng.randrange(LIVE))
                order.generated(call_id, rng.randrange(20, 500))
                order.ended(call_id)
    finally:
        gc.enable()
    times.sort()
    return times[int(0.99 * len(times))] / 1000
