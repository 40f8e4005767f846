"""Simulation of scaling in virtual time: models have demand from a trace, and a policy sets their numbers of replicas.

Every `every_s` seconds the policy receives what the controller would observe, and decides. Decisions are carried out at
once. A new replica holds its GPUs from the decision on, and serves after the cold start. An unwanted replica leaves at
once; starting replicas leave first. Equal inputs give equal runs. No policy sees the future.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.policy.fairness.output_lengths import KEPT, LearntOutputs
from cluster.policy.scaling.portfolio import (
    ClassDemand,
    Memory,
    ModelSeen,
    ModelSettings,
    Observation,
    Rates,
    ReplicaDecision,
    ReplicaSeen,
    decide,
)
from loadtests.sim.fleet import Arrival, Fleet
from loadtests.sim.plant import SMALL, ReplicaModel

Floats = NDArray[np.float64]
UNBOUNDED = 1 << 20


@dataclass(frozen=True, slots=True)
class Demand:
    """Calls in the order of arrival. Each element of the arrays stands for a group of equal calls that arrive together;
    `count` is the number of calls in each group."""

    at_s: Floats
    count: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    duration_s: float
    runs_to_most: bool = False
    """Whether every output runs to its max_tokens. Gateways learn to expect such lengths from the first outputs."""


@dataclass(frozen=True, slots=True)
class SimModelSpec:
    """A model that is served in the simulation: its demand, step times and settings. `initial`: number of replicas that
    are ready at time 0."""

    demand: Demand
    settings: ModelSettings
    plant: ReplicaModel = SMALL
    initial: int = 1
    rank_class: str = "standard"


@dataclass(slots=True)
class Track:
    """Results of the simulated run of one model. The lists have one value for each decision. `held`: number of starting
    and ready replicas."""

    at_s: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    good: list[float] = field(default_factory=list)
    bad: list[float] = field(default_factory=list)
    gpu_s: float = 0.0
    arrived: float = 0.0
    good_calls: float = 0.0
    starts: int = 0
    downs: int = 0
    reversed_downs: int = 0
    decisions: list[ReplicaDecision] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of the calls within the SLO. A call still running at the end counts as within the SLO if its first
        token was in time. A call still waiting at the end counts as outside the SLO."""
        return self.good_calls / self.arrived if self.arrived else 1.0


Scaler = Callable[[Observation, float], Mapping[str, int]]
"""Function that takes an observation and the time, and returns the wanted number of replicas by model."""


class OurPolicy:
    """The production policy with its memory. `keep`: whether to collect all decisions in `kept`."""

    def __init__(self, keep: bool = False) -> None:
        self.memory = Memory()
        self.kept: list[ReplicaDecision] | None = [] if keep else None

    def __call__(self, observation: Observation, now_s: float) -> Mapping[str, int]:
        """Return the wanted number of replicas by model."""
        decisions, self.memory = decide(observation, self.memory, now_s)
        if self.kept is not None:
            self.kept.extend(decisions)
        return {d.model: d.total for d in decisions}


class _SimulatedModel:
    """One model in a simulation run: its replicas and its demand."""

    def __init__(
        self, name: str, spec: SimModelSpec, cold_start_s: float, tick_s: float, learnt: LearntOutputs
    ) -> None:
        self.name, self.spec, self.cold_start_s = name, spec, cold_start_s
        slo = spec.settings.slo
        self.fleet = Fleet(spec.plant, slo.ttft_s, slo.itl_s)
        self.ready: list[tuple[str, float]] = [(f"r{i}", 0.0) for i in range(spec.initial)]
        self.starting: list[tuple[str, float]] = []
        self.serial = spec.initial
        self.track = Track()
        self.cursor = 0
        demand = spec.demand
        self.at = demand.at_s.tolist()
        self.count = demand.count.tolist()
        self.prompt = demand.prompt_tokens.tolist()
        self.output = demand.output_tokens.tolist()
        self.seen_calls = self.seen_prompt = self.reported_output = 0.0
        self.learnt = learnt
        self.fleet.on_end = self._ended
        self.judged_good = self.judged_bad = 0.0
        self.down_at: float | None = None
        self.rates = {
            gpu: Rates(
                spec.plant.prefill_at(slo.itl_s),
                spec.plant.decode_tokens_per_s(slo.itl_s),
                spec.plant.kv_tokens,
                spec.plant.sequences(slo.itl_s),
            )
            for gpu in spec.settings.gpus
        }

    def tick(self, now_s: float, dt: float) -> None:
        while self.starting and self.starting[0][1] + self.cold_start_s <= now_s + 1e-9:
            name, _ = self.starting.pop(0)
            self.ready.append((name, now_s))
        at, fleet, end = self.at, self.fleet, now_s + dt
        while self.cursor < len(at) and at[self.cursor] < end:
            i = self.cursor
            most = round(self.output[i]) if self.spec.demand.runs_to_most else UNBOUNDED
            expected = self.learnt.expected("", self.name, most)
            fleet.arrive(at[i], Arrival(self.count[i], self.prompt[i], self.output[i], expected))
            self.seen_calls += self.count[i]
            self.seen_prompt += self.count[i] * self.prompt[i]
            self.cursor += 1
        fleet.tick(now_s, dt, len(self.ready))
        self.track.gpu_s += dt * (len(self.ready) + len(self.starting))

    def _ended(self, count: float, tokens: float) -> None:
        for _ in range(max(min(round(count), KEPT), 1)):
            self.learnt.observe("", self.name, round(tokens), cut=self.spec.demand.runs_to_most)

    def observe(self, now_s: float) -> ModelSeen:
        fleet, n = self.fleet, len(self.ready)
        good, bad = fleet.good - self.judged_good, fleet.late + fleet.slow - self.judged_bad
        self.judged_good, self.judged_bad = fleet.good, fleet.late + fleet.slow
        oldest = fleet.oldest_at_s
        waiting = round(fleet.waiting_calls)
        demand = ClassDemand(
            arrived_requests=round(self.seen_calls),
            arrived_prompt_tokens=round(self.seen_prompt),
            expected_output_tokens=round(max(fleet.expected_tokens - self.reported_output, 0.0)),
            queued_requests=waiting,
            queued_tokens=round(fleet.waiting_tokens),
            oldest_wait_s=max(now_s - oldest, 0.0) if oldest is not None else 0.0,
            within_slo=round(good),
            outside_slo=round(bad),
            held_requests=waiting if n == 0 else 0,
        )
        self.track.good.append(good)
        self.track.bad.append(bad)
        self.seen_calls = self.seen_prompt = 0.0
        self.reported_output = max(self.reported_output, fleet.expected_tokens)
        each = round(fleet.running / n) if n else 0
        use = min(fleet.kv / n / self.spec.plant.kv_tokens, 1.0) if n else 0.0
        gpu = self.spec.settings.gpus[0]
        replicas = [ReplicaSeen(name, "ready", since, gpu, each, use) for name, since in self.ready]
        replicas += [ReplicaSeen(name, "starting", since, gpu) for name, since in self.starting]
        return ModelSeen(self.spec.settings, {self.spec.rank_class: demand}, replicas, self.rates)

    def set_wanted(self, wanted: int, now_s: float) -> None:
        have = len(self.ready) + len(self.starting)
        if wanted > have:
            for _ in range(wanted - have):
                self.serial += 1
                self.starting.append((f"r{self.serial}", now_s))
            self.track.starts += wanted - have
            if self.down_at is not None and now_s - self.down_at <= self.cold_start_s:
                self.track.reversed_downs += 1
            self.down_at = None
        elif wanted < have:
            gone = min(have - wanted, len(self.starting))
            if gone:
                del self.starting[-gone:]
            more = have - wanted - gone
            if more:
                self.fleet.leave(more / len(self.ready))
                del self.ready[-more:]
            self.track.downs += 1
            self.down_at = now_s


def simulate(
    specs: Mapping[str, SimModelSpec],
    scaler: Scaler,
    *,
    cold_start_s: float = 60.0,
    every_s: float = 5.0,
    tick_s: float = 0.25,
    gpu_budget: Mapping[str, int] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Track]:
    """Run all models to the end of the longest demand, and return the results by model. `scaler` decides every
    `every_s` seconds."""
    learnt = LearntOutputs()
    models = {name: _SimulatedModel(name, spec, cold_start_s, tick_s, learnt) for name, spec in specs.items()}
    duration_s = max(spec.demand.duration_s for spec in specs.values())
    ticks, per_decision = round(duration_s / tick_s), round(every_s / tick_s)
    for number in range(ticks):
        now_s = number * tick_s
        if number % per_decision == 0 and number:
            seen = {name: model.observe(now_s) for name, model in models.items()}
            wanted = scaler(Observation(seen, gpu_budget or {}, ranks or {}, covers_s=every_s), now_s)
            for name, model in models.items():
                model.set_wanted(wanted[name], now_s)
                model.track.at_s.append(now_s)
                model.track.ready.append(len(model.ready))
                model.track.held.append(len(model.ready) + len(model.starting))
        for model in models.values():
            model.tick(now_s, tick_s)
    for model in models.values():
        _close(model, duration_s)
    return {name: model.track for name, model in models.items()}


def _close(model: _SimulatedModel, now_s: float) -> None:
    """Judge the calls that still run at the end: a stream is good if its first token was in time."""
    fleet, track = model.fleet, model.track
    track.arrived = fleet.arrived
    still = sum(count for _, _, count, *_ in fleet._streams if count > 0)
    track.good_calls = fleet.good + still


def needed(demand: Demand, plant: ReplicaModel, itl_s: float, slot_s: float) -> Sequence[float]:
    """Return for each slot of `slot_s` seconds how many fully used replicas the arriving work takes."""
    work = demand.count * (
        demand.prompt_tokens / plant.prefill_at(itl_s) + demand.output_tokens / plant.decode_tokens_per_s(itl_s)
    )
    slots = int(np.ceil(demand.duration_s / slot_s))
    index = np.minimum((demand.at_s / slot_s).astype(int), slots - 1)
    return [float(v) for v in np.bincount(index, weights=work, minlength=slots) / slot_s]
