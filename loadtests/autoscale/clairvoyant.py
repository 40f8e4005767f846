"""Compute the clairvoyant optimum: the cheapest plan of replicas that meets the SLO if the whole demand is known in
advance.

optimum.py computes plans by a recursion over time slots. It uses a fluid model, which leaves out two effects: prefills
delay decoding, and calls arrive unevenly within a slot. So a plan without late calls in the fluid model may have late
calls in reality.

The recursion is therefore run several times, each time with other settings: less slack (the longest time that a call
may wait) than the demand has, more work than the demand has, and one of two paces of decoding. `TRIED` lists the
combinations. Each plan is then replayed call by call in the simulation that the scaling policies also use, with the
same step model of a replica (`plant`). The optimum is the cheapest plan that meets the SLO in this replay.

A call's slack is the target time to first token minus the time of the call's prefill. `bound_s`, which the recursion
computes, is a lower bound of the cost in GPU-seconds. It holds for the fluid model only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cluster.policy.scaling.portfolio import ModelSettings, Observation
from loadtests.autoscale.optimum import Plan, Rules, Slots, cost_of, optimum
from loadtests.sim.plant import ReplicaModel
from loadtests.sim.scaling import Demand, Floats, SimModelSpec, Track, simulate

TRIED = ((0.8, 1.05, 0.03), (0.8, 1.12, 0.03), (0.5, 1.05, 0.03), (0.5, 1.02, 0.08), (0.2, 1.02, 0.08))
CLASSES_S = (0.2, 0.5, 1.0, 1.5)
"""Upper bounds of the call classes, in seconds of prefill. The last class holds all longer prefills."""
LINGERS = (0, 1, 2)
"""Numbers of slots for which a replica stays beyond the recursion's plan, tried in order until the SLO holds. The
recursion does not know that a stream of a leaving replica is computed again on another replica.
"""
NEAR = 0.1
"""Largest miss of the SLO target at which a plan is retried with lingering replicas."""
BESIDE = 30.0
"""Number of running sequences that is assumed when the prefill time of a prompt is estimated."""


@dataclass(frozen=True, slots=True)
class Clairvoyant:
    """The cheapest plan of replicas that meets the SLO if the demand is known in advance. The demand was replayed to
    check the plan. `cost_s`: GPU-seconds of the plan, including starts."""

    cost_s: float
    bound_s: float
    attainment: float
    replicas: Floats
    slot_s: float
    share: float

    @property
    def initial(self) -> int:
        """Number of replicas that exist when the demand begins. The cost of the plan includes no start of these
        replicas."""
        return int(self.replicas[0])


def slots_of(
    demand: Demand, plant: ReplicaModel, itl_s: float, slot_s: float, quanta: int, more: float, pace_s: float
) -> Slots:
    """Return the demand by time slot. The work of a prompt falls into the slot where the call arrives. The work of an
    output is spread over the duration of the stream: `pace_s` for each token. `more`: factor by which all work is
    multiplied. `quanta`: number of units of work that one replica serves in a slot."""
    count = int(np.ceil(demand.duration_s / slot_s))
    at = np.minimum((demand.at_s / slot_s).astype(int), count - 1)
    prompt = demand.count * demand.prompt_tokens / plant.prefill_at(itl_s)
    work = np.bincount(at, weights=prompt, minlength=count).astype(float)
    decode = demand.count * demand.output_tokens / plant.decode_tokens_per_s(itl_s)
    begin = demand.at_s / slot_s
    length = np.maximum(demand.output_tokens * pace_s / slot_s, 1e-6)
    work += _spread(begin, np.minimum(begin + length, count), decode / length, count)
    own_s = demand.prompt_tokens / plant.most_prefill(BESIDE)
    kind = np.searchsorted(np.array(CLASSES_S), own_s)
    classes = len(CLASSES_S) + 1
    calls = np.bincount(at * classes + kind, weights=demand.count, minlength=count * classes).astype(float)
    return Slots.of((work * more).tolist(), calls.reshape(count, classes), slot_s, quanta)


def slacks_of(ttft_s: float, slot_s: float, share: float) -> tuple[float, ...]:
    """Return the slack of each class of calls, in time slots of `slot_s` seconds; -1 if there is no slack.

    A class holds the calls with similar prefill times (CLASSES_S). Its slack is `share` times the longest time that a
    call may wait: the TTFT target minus the prefill time in the middle of the class.
    """
    edges = (0.0, *CLASSES_S, 2 * ttft_s)
    slack_s = [ttft_s - (low + high) / 2 for low, high in pairwise(edges)]
    return tuple(value * share / slot_s if value > 0 else -1.0 for value in slack_s)


def _spread(begin: Floats, end: Floats, rate: Floats, count: int) -> Floats:
    """Return the amount that falls into each of `count` slots. Item i adds `rate[i]` per slot from `begin[i]` to
    `end[i]`, both in slots."""
    edges = np.arange(count + 1)
    total = np.zeros(count + 1)
    for times, sign in ((begin, 1.0), (end, -1.0)):
        order = np.argsort(times)
        sums = np.concatenate([[0.0], np.cumsum(rate[order])])
        moments = np.concatenate([[0.0], np.cumsum(rate[order] * times[order])])
        known = np.searchsorted(times[order], edges, side="right")
        total += sign * (sums[known] * edges - moments[known])
    out: Floats = np.diff(total)
    return out


def replay(
    demand: Demand, plant: ReplicaModel, settings: ModelSettings, replicas: Floats, slot_s: float, tick_s: float
) -> Track:
    """Simulate a plan unchanged. `replicas`: the plan, a number of replicas for each slot. Each replica is ready when
    the plan needs it, since it would be started one cold start earlier."""
    counts = [int(n) for n in replicas]

    def planned(_: Observation, now_s: float) -> dict[str, int]:
        return {"m": counts[min(round(now_s / slot_s), len(counts) - 1)]}

    spec = SimModelSpec(demand, settings, plant, counts[0])
    return simulate({"m": spec}, planned, cold_start_s=0.0, every_s=slot_s, tick_s=tick_s)["m"]


def clairvoyant(
    demand: Demand,
    plant: ReplicaModel,
    settings: ModelSettings,
    most: int,
    *,
    slot_s: float = 1.0,
    quanta: int = 4,
    tick_s: float = 0.25,
    tried: Sequence[tuple[float, float, float]] = TRIED,
    tries: int = 8,
) -> Clairvoyant | None:
    """Return the cheapest plan of replicas that meets the SLO when it is replayed call by call in the simulation; None
    if no plan meets it. `plant`: the step model of a replica. `most`: largest number of replicas. `slot_s`: length of a
    planning step in seconds. `tick_s`: time step of the replay in seconds. `tried`: the combinations of planner
    settings to try."""
    slo, best = settings.slo, None
    for share, more, pace_s in tried:
        slots = slots_of(demand, plant, slo.itl_s, slot_s, quanta, more, pace_s)
        slacks = slacks_of(slo.ttft_s, slot_s, share)
        rules = Rules(slacks, settings.cold_start_s, most, settings.min_replicas, max(slacks) + max(0.5 / slot_s, 0.1))

        held: list[tuple[float, float, Floats]] = []

        def holds(plan: Plan) -> bool:
            for linger in LINGERS:
                replicas = lingering(plan.replicas.astype(float), linger)
                attained = replay(demand, plant, settings, replicas, slot_s, tick_s).attainment
                if attained >= slo.target:
                    held.append((cost_of(replicas.astype(np.int64), slots, rules).cost_s, attained, replicas))  # noqa: B023
                    return True
                if attained < slo.target - NEAR:
                    break
            return False

        solution = optimum(slots, rules, 1.0 - slo.target, tries, holds)
        if solution is not None:
            cost_s, attained, replicas = min(held, key=lambda candidate: candidate[0])
            if best is None or cost_s < best.cost_s:
                best = Clairvoyant(cost_s, solution.bound_s, attained, replicas, slot_s, share)
    return best


def lingering(replicas: Floats, slots: int) -> Floats:
    """Return the plan `replicas` (number of replicas by time slot) with each replica kept for `slots` more
    slots.

    In this time the streams on the replica can end, and need not move to another one.
    """
    padded = np.concatenate([np.full(slots, replicas[0]), replicas])
    out: Floats = np.lib.stride_tricks.sliding_window_view(padded, slots + 1).max(axis=1)
    return out
