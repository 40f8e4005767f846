"""Runs of the scenario `autoscale`. Each run is a function of plain values, so that the run can take place in another
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.policy.scaling.portfolio import ModelSettings
from loadtests.autoscale import demand as demands
from loadtests.autoscale.clairvoyant import Clairvoyant, clairvoyant
from loadtests.autoscale.ray_policy import RayPolicy, RaySettings, grid
from loadtests.autoscale.static import best_placement
from loadtests.sim.plant import LARGE, SMALL, ReplicaModel
from loadtests.sim.scaling import Demand, OurPolicy, Scaler, SimModelSpec, Track, needed, simulate

SETTINGS = ModelSettings(min_replicas=1, max_replicas=400)
EQUAL = 0.7
"""Bound on cost when violations are compared: Ray Serve's policy may use our GPU-seconds divided by this value."""
WITHIN_S = 10.0
"""Window in which the copies of a trace call arrive and in which the peaks of the trace are counted, in seconds."""
MOST_WEEK = 200
"""Upper bound on replicas. The sum of all clients peaks at 125 replicas over 30 s; bursts within a second reach several
times that number.
"""
GPUS, CLIENTS, SHARED_S = 16, 20, 12 * 3600.0


@dataclass(frozen=True, slots=True)
class Case:
    """Demand of one model, and the step model of its replicas (`plant`). `most`: largest number of replicas that the
    optimum may use."""

    name: str
    demand: Demand
    plant: ReplicaModel
    most: int
    slot_s: float = 1.0
    quanta: int = 4
    tick_s: float = 0.25
    every_s: float = 5.0
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Line of a plot: values at given times."""

    at_s: list[float]
    load: list[float]
    held: list[int]
    late: list[float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one scaler in one case."""

    gpu_s: float
    attainment: float
    arrived: float
    starts: int
    downs: int
    taken_back: int
    line: Line | None = None

    @property
    def violations(self) -> float:
        """Number of calls outside the SLO."""
        return self.arrived * (1.0 - self.attainment)


@dataclass(frozen=True, slots=True)
class CaseResults:
    """Results of one case: our policy, the optimum, and Ray Serve's policy where requested."""

    name: str
    ours: Outcome
    optimum: Clairvoyant | None
    load: float
    ray_default: Outcome | None = None
    ray_best: tuple[RaySettings, Outcome] | None = None
    """The cheapest setting of the grid that meets the SLO, else the setting with the fewest violations."""
    ray_equal: tuple[RaySettings, Outcome] | None = None
    """The setting with the fewest violations among the grid's settings within our GPU-seconds / `EQUAL`; None if no
    setting is within that cost.
    """


@dataclass(frozen=True, slots=True)
class Shared:
    """Results for twenty models on sixteen GPUs: calls within the SLO and GPU-seconds held, under our policy and under
    static placement.
    """

    ours_good: float
    ours_gpu_s: float
    static_good: float
    static_gpus: int
    arrived: float
    downs: int
    taken_back: int
    placement: dict[str, int] = field(default_factory=dict)


def case(name: str, seed: int) -> Case:
    """Return the case of the given name. Raises NoData if the trace is absent, KeyError for an unknown name."""
    hour = 3600.0
    steady = np.full(360, 50.0)
    wave = 60.0 + 35.0 * np.sin(2 * np.pi * np.arange(720) / 360)
    steps = np.repeat(np.random.default_rng(seed).uniform(30.0, 60.0, 12), 60)
    if name in ("azure-conv", "azure-code"):
        most, quanta = (30, 4) if name == "azure-conv" else (90, 1)
        return Case(name, demands.from_trace(name, seed=seed, within_s=WITHIN_S), SMALL, most, quanta=quanta)
    if name == "mooncake":
        return Case(name, demands.from_trace(name, seed=seed, within_s=WITHIN_S), LARGE, 30)
    if name == "servegen-week":
        week = demands.servegen(range(demands.CLIENTS), seed, scale=1.0)
        return Case(name, week, LARGE, MOST_WEEK, slot_s=30.0, quanta=1, tick_s=1.0, every_s=10.0)
    made = {
        "poisson": (steady, 10.0, 1.0),
        "gamma cv 3": (steady, 10.0, 3.0),
        "diurnal": (wave, 10.0, 1.0),
        "steps": (steps, 10.0, 1.0),
    }
    if name in made:
        rate, step_s, cv = made[name]
        return Case(name, demands.synthetic(rate.tolist(), step_s, cv, (1000.0, 200.0), seed), SMALL, 36, held_out=True)
    if name == "azure-conv, copies within 60 s":
        return Case(name, demands.from_trace("azure-conv", seed=seed, within_s=60.0), SMALL, 30, held_out=True)
    if name == "vtc":
        return Case(name, demands.from_trace("vtc", times=64, seed=seed, within_s=WITHIN_S), SMALL, 30, held_out=True)
    if name == "servegen second week, a day":
        day = demands.servegen(range(demands.CLIENTS), seed, scale=1.0, begin_s=9 * 24 * hour, duration_s=24 * hour)
        return Case(name, day, LARGE, MOST_WEEK, 30.0, 1, 1.0, 10.0, held_out=True)
    raise KeyError(name)


TRACES = ("azure-conv", "mooncake", "azure-code", "servegen-week")
HELD_OUT = (
    "poisson", "gamma cv 3", "diurnal", "steps", "azure-conv, copies within 60 s", "vtc", "servegen second week, a day",
)  # fmt: skip


def outcome(track: Track, demand: Demand, plant: ReplicaModel, keep: bool) -> Outcome:
    """Return the figures of a simulated run, which `track` has recorded.

    With `keep`, the result also has the run's curve for the plot, in steps of 30 s or longer. `demand` and `plant` (the
    model of a replica) are needed only for the curve: it shows how many replicas the demand requires.
    """
    line = None
    if keep and track.at_s:
        step = max(int(np.ceil(len(track.at_s) / 600)), 1)
        slot_s = track.at_s[0] * step
        load = needed(demand, plant, SETTINGS.slo.itl_s, slot_s)
        late = [float(sum(track.bad[i : i + step])) for i in range(0, len(track.at_s), step)]
        held = track.held[::step]
        line = Line(track.at_s[::step], list(load)[: len(held)], held, late)
    return Outcome(track.gpu_s, track.attainment, track.arrived, track.starts, track.downs, track.reversed_downs, line)


def play(scenario: Case, scaler: Scaler, initial: int, keep: bool = False) -> Outcome:
    """Simulate one case once and return the outcome. `initial`: number of replicas at the start. `keep`: whether the
    outcome also holds the values over time for a plot."""
    spec = SimModelSpec(scenario.demand, SETTINGS, scenario.plant, initial)
    track = simulate(
        {"m": spec}, scaler, cold_start_s=SETTINGS.cold_start_s, every_s=scenario.every_s, tick_s=scenario.tick_s
    )["m"]
    return outcome(track, scenario.demand, scenario.plant, keep)


def compare(name: str, seed: int, with_ray: bool) -> CaseResults:
    """Run one case with the optimum, with our policy and, if `with_ray` is true, with Ray Serve's policy. All of them
    begin with the same number of replicas."""
    scenario = case(name, seed)
    best = clairvoyant(
        scenario.demand,
        scenario.plant,
        SETTINGS,
        scenario.most,
        slot_s=scenario.slot_s,
        quanta=scenario.quanta,
        tick_s=scenario.tick_s,
    )
    load = float(np.mean(needed(scenario.demand, scenario.plant, SETTINGS.slo.itl_s, 60.0)))
    initial = best.initial if best is not None else max(round(1.2 * load), 1)
    ours = play(scenario, OurPolicy(), initial, keep=True)
    results = CaseResults(name, ours, best, load)
    if not with_ray:
        return results
    default = play(scenario, RayPolicy(RaySettings()), initial)
    tried = [(settings, play(scenario, RayPolicy(settings), initial)) for settings in grid()]
    within = [t for t in tried if t[1].attainment >= SETTINGS.slo.target]
    chosen = min(within, key=lambda t: t[1].gpu_s) if within else max(tried, key=lambda t: t[1].attainment)
    affordable = [t for t in tried if t[1].gpu_s <= ours.gpu_s / EQUAL]
    equal = min(affordable, key=lambda t: t[1].violations) if affordable else None
    return replace(results, ray_default=default, ray_best=chosen, ray_equal=equal)


def shared_models(seed: int) -> dict[str, Demand]:
    """Return the demand of twenty clients of ServeGen's data set m-small over half a day. One factor scales all clients
    so that the peak of the summed demand takes all GPUs.
    """
    rng = np.random.default_rng(seed)
    begin_s = 86_400.0 * int(rng.integers(1, 12)) + 6 * 3600.0
    first = round(begin_s / demands.WINDOW_S)
    window = slice(first, first + round(SHARED_S / demands.WINDOW_S))
    rates = {n: demands.client_rates(n)[0][window] for n in range(demands.CLIENTS)}
    awake = [n for n, rate in rates.items() if (rate > 0).any()]
    chosen = sorted(rng.permutation(awake)[:CLIENTS].tolist())
    load = np.zeros(window.stop - window.start)
    for number in chosen:
        lengths = demands.client_lengths(number) or demands.pooled_lengths()
        each = SMALL.busy(float(lengths[0] @ lengths[1]), float(lengths[2] @ lengths[3]), SETTINGS.slo.itl_s)
        load += rates[number] * each
    scale = GPUS / float(load.max())
    return {
        f"client-{n}": demands.servegen([n], seed, scale=scale, begin_s=begin_s, duration_s=SHARED_S) for n in chosen
    }


def share(seed: int) -> Shared:
    """Compare our policy under a GPU budget with the best static placement for the same demand."""
    models = shared_models(seed)
    settings = ModelSettings(min_replicas=0, max_replicas=GPUS, idle_s=120.0)
    specs = {name: SimModelSpec(demand, settings, SMALL, 0) for name, demand in models.items()}
    tracks = simulate(specs, OurPolicy(), every_s=10.0, tick_s=1.0, gpu_budget={"": GPUS})
    goodput = {name: [0.0, *_static_goodput(demand)] for name, demand in models.items()}
    placement = best_placement(goodput, GPUS)
    return Shared(
        sum(t.good_calls for t in tracks.values()),
        sum(t.gpu_s for t in tracks.values()),
        sum(goodput[name][count] for name, count in placement.items()),
        sum(placement.values()),
        sum(t.arrived for t in tracks.values()),
        sum(t.downs for t in tracks.values()),
        sum(t.reversed_downs for t in tracks.values()),
        placement,
    )


def _static_goodput(demand: Demand) -> Sequence[float]:
    """Return the goodput with 1, 2, ... replicas, up to the number beyond which more replicas gain nothing."""
    out: list[float] = []
    for count in range(1, GPUS + 1):
        spec = SimModelSpec(demand, SETTINGS, SMALL, count)
        track = simulate({"m": spec}, lambda _o, _t, n=count: {"m": n}, every_s=60.0, tick_s=1.0)["m"]  # type: ignore[misc]
        out.append(track.good_calls)
        if track.attainment > 0.999:
            break
    return out
