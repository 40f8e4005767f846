"""Replica target of one model, computed from its observed demand. The GPU budget is not considered here.

Scale-up: the number of replicas is raised at once to the number that the followed rules (backtest.py) ask for.

Scale-down: a replica is removed if it was not wanted at any time during the patience, which is about half a cold start.
Keeping a replica for a whole cold start would cost as much as starting it again (ski rental). For one cold start after
a scale-down, replicas are started only if calls wait too long or the target is far higher than before the scale-down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster.policy.scaling.portfolio import backtest, forecast, marginal_gain
from cluster.policy.scaling.portfolio.backtest import FOLLOWING, MARGINS, Arrivals
from cluster.policy.scaling.portfolio.memory import Fidelity, ModelMemory, Past, Stretch
from cluster.policy.scaling.portfolio.types import ModelSeen, Rates

STRETCHES = 24
"""Maximum number of learning steps per cold start."""
TRUSTED = 5.0
"""Number of cold starts of observed demand after which the target follows the rules."""
BLIND = 2.0
"""Number of cold starts of observed demand before any replica is removed. Before that time there is no forecast."""
FIRST_MARGIN = 1.4
WINDOW = 60.0
"""Number of cold starts over which the SLO budget of late calls applies: one hour if a cold start takes a minute."""
LEAST_MARGIN = 0.2
"""Minimum margin over the mean load of one cold start, before any demand was observed. Later the margin is divided by
the square root of 1 + observed time / WINDOW. Public traces usually move by about this fraction within a cold start."""
SHARE_OF_BUDGET = 0.75
"""Planned part of the budget of late calls. A late call is unforeseen if the backtest served it in time. The budget of
the rules is the planned part minus the unforeseen late calls. The correction keeps the share of unforeseen late calls
at the planned part."""
PACE = 0.12
"""Step size of the correction, a factor on the replicas that the rules ask for. In one cold start the logarithm of the
correction grows by PACE times (share of unforeseen late calls - SHARE_OF_BUDGET * budget). So while the correction is
within its bounds, the share converges to that part of the budget, whatever the demand does. A correction by the mean of
two hours, tried earlier, kept rising long after its value was enough and swung between the bounds. Source: Gibbs and
Candes, Adaptive Conformal Inference Under Distribution Shift (2021)."""
HEAVIEST = 4.0
"""Maximum weight of a stretch in the correction. The weight is the stretch's calls per second relative to the mean."""
LEAST, MOST = 1.0, 2.0
"""Bounds of the correction."""
DOUBT = 0.07
"""Additional load in the replay of rules, as a fraction of the observed load. The fraction is DOUBT divided by the
square root of the number of observed cold starts. It offsets selection bias: the cheapest of many rules overfits the
past."""
PATIENCE = 0.45
"""Number of cold starts for which an unwanted replica is kept. The slow fall of signals adds to this time."""
HOLD = 0.25
"""Within one cold start of a scale-down, no replica is started if the target exceeds the number before the scale-down
by at most this fraction. Margins cover such a swing, and a new replica would not serve before the swing is over."""
OVERLOAD = 2.0
"""Number of cold starts over which backtested overload is averaged, because calls are judged some time after their
arrival."""
EXPLAINED = 0.1
"""Share of late calls in the backtest above which all late calls count as foreseen."""
STREAMS = 1 / 3
"""Number of cold starts over which the decoding of running streams is averaged: about the duration of a stream."""
BEHIND = 0.05
"""Outstanding decoding work with which streams still keep the pace of the SLO, as a fraction of the decoding work that
comes during one stream at this pace. With 0.2, the backtest missed almost all slow streams of ServeGen's trace (0.7 %
of its streams)."""
UNKNOWN_RANK = 1 << 10
SPREAD = 3.0
"""Capacity covers this number of standard deviations of the number of calls that arrive in a cold start."""


@dataclass(frozen=True, slots=True)
class ReplicaTarget:
    """Replica target of one model. `load`: the expected load. The unit of `replicas` and `load` is one replica of the
    first GPU type."""

    replicas: int
    why: str
    load: float
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """Work that came between two observations. The fields that end in `_s` are in replica-seconds of the first GPU
    type."""

    load_s: float
    prompt_s: float
    waiting_s: float
    by_rank_s: Mapping[int, float]
    calls: int
    queued: int
    held: int
    within: int
    outside: int
    tokens: int = 0
    """Expected number of output tokens."""


def work_of(seen: ModelSeen, ranks: Mapping[str, int]) -> ReplicaWork | None:
    """Return the work that came since the last observation. Returns None until the speeds of prefill and decode on the
    model's first GPU type have been learnt.

    `ranks`: rank of each priority class.
    """
    rates = seen.rates.get(seen.settings.gpus[0], Rates())
    demand = seen.demand
    if not rates.prefill_tokens_per_s or not rates.decode_tokens_per_s:
        return None
    prompt = {c: d.arrived_prompt_tokens / rates.prefill_tokens_per_s for c, d in demand.items()}
    load = {c: prompt[c] + d.expected_output_tokens / rates.decode_tokens_per_s for c, d in demand.items()}
    by_rank: dict[int, float] = {}
    for name, value in load.items():
        rank = ranks.get(name, UNKNOWN_RANK)
        by_rank[rank] = by_rank.get(rank, 0.0) + value
    return ReplicaWork(
        sum(load.values()),
        sum(prompt.values()),
        sum(d.queued_tokens for d in demand.values()) / rates.prefill_tokens_per_s,
        by_rank,
        sum(d.arrived_requests for d in demand.values()),
        sum(d.queued_requests for d in demand.values()),
        sum(d.held_requests for d in demand.values()),
        sum(d.within_slo for d in demand.values()),
        sum(d.outside_slo for d in demand.values()),
        sum(d.expected_output_tokens for d in demand.values()),
    )


def learn(memory: ModelMemory, seen: ModelSeen, work: ReplicaWork, passed_s: float, now_s: float) -> ModelMemory:
    """Return `memory` updated with the demand of the last `passed_s` seconds. `work`: this demand."""
    before = memory.stretch
    stretch = Stretch(
        before.passed_s + passed_s,
        before.load_s + work.load_s,
        before.calls + work.calls,
        before.within + work.within,
        before.outside + work.outside,
        before.prompt_s + work.prompt_s,
        before.tokens + work.tokens,
    )
    cold_s = max(seen.settings.cold_start_s, 1.0)
    if passed_s > 0:
        share = -math.expm1(-passed_s / (5.0 * cold_s))
        known = {**dict.fromkeys(memory.ranks, 0.0), **work.by_rank_s}
        ranks = {r: (v := memory.ranks.get(r, 0.0)) + (s / passed_s - v) * share for r, s in known.items()}
        calls = memory.calls_per_s + (work.calls / passed_s - memory.calls_per_s) * share
        memory = replace(memory, ranks={r: v for r, v in ranks.items() if v > 1e-9}, calls_per_s=calls)
        output = (work.load_s - work.prompt_s) / passed_s
        each = work.tokens / work.calls if work.calls else memory.tokens
        lately = -math.expm1(-passed_s / (STREAMS * cold_s))
        share = max(share, passed_s / (memory.levels.seen_s + passed_s))
        memory = replace(
            memory,
            output=memory.output + (output - memory.output) * lately,
            tokens=memory.tokens + (each - memory.tokens) * share,
        )
    if stretch.passed_s < cold_s / STRETCHES:
        return replace(memory, stretch=stretch)
    return _learn_stretch(replace(memory, stretch=Stretch()), seen, stretch, cold_s, now_s)


def _learn_stretch(memory: ModelMemory, seen: ModelSeen, stretch: Stretch, cold_s: float, now_s: float) -> ModelMemory:
    slo = seen.settings.slo
    load = stretch.load_s / stretch.passed_s
    own_s = stretch.prompt_s / stretch.calls if stretch.calls else 0.0
    arrivals = Arrivals(
        load,
        stretch.calls,
        max(slo.ttft_s - 2.0 * own_s, slo.ttft_s / 4),
        memory.output * memory.tokens * slo.itl_s * BEHIND,
    )
    kept = [p for p in memory.past if p.at_s >= now_s - max(PATIENCE, 1.0) * cold_s - 1e-6]
    past = [p for p in kept if p.at_s >= now_s - cold_s - 1e-6]
    aged = bool(past) and past[0].at_s <= now_s - cold_s + 1.5 * stretch.passed_s
    levels = forecast.update(
        memory.levels, load, stretch.passed_s, cold_s, (past[0].means, past[0].signals) if aged else None
    )
    patient = [p.signals for p in kept if p.at_s >= now_s - PATIENCE * cold_s - 1e-6]
    plans = np.maximum.reduce([levels.signals, *patient])
    least = np.minimum.reduce([plans, *(p.plans for p in past)])
    kept.append(Past(now_s, levels.means, levels.signals, plans))
    wanted = backtest.round_up(backtest.wanted_by_rule(plans, levels.stray), 1.0)
    ready = backtest.round_up(backtest.wanted_by_rule(least, levels.stray), 1.0)
    replayed = memory.backtest
    # Earlier, every rule would be penalised for the start of demand, which no rule could foresee.
    if memory.levels.seen_s >= BLIND * cold_s:
        blocks = max(memory.backtest.time_s / cold_s, 1.0)
        doubt = 1.0 + DOUBT / math.sqrt(blocks)
        replayed = backtest.replay(memory.backtest, wanted, ready, arrivals, doubt, stretch.passed_s, cold_s)
    fidelity = _update_fidelity(memory.fidelity, seen, stretch, arrivals, cold_s)
    budget = 1.0 - slo.target
    unforeseen = max(fidelity.late - fidelity.predicted_late, 0.0) / max(fidelity.calls, 1.0)
    share = min(max(SHARE_OF_BUDGET * budget - unforeseen, 0.1 * budget), budget)
    # The rest of the budget of the window is available, unless real late calls have already spent the budget.
    ahead = max(WINDOW * cold_s / max(replayed.time_s, 1e-9), 1.0)
    spent = fidelity.late / max(fidelity.calls, 1.0) / (budget * ahead)
    ahead = 1.0 + (ahead - 1.0) * max(1.0 - spent, 0.0)
    rules = backtest.cheapest_rules(replayed, share, ahead) if replayed.time_s else ()
    won = marginal_gain.replay(memory.gains, arrivals, stretch.passed_s, cold_s)
    return replace(
        memory, levels=levels, backtest=replayed, gains=won, past=tuple(kept), rules=rules, fidelity=fidelity
    )


def _update_fidelity(
    before: Fidelity, seen: ModelSeen, stretch: Stretch, arrivals: Arrivals, cold_s: float
) -> Fidelity:
    """Compare the share of late calls in reality with the share that a backtest of the real replicas predicts.
    Returns the new state of this comparison.

    `before`: the state at the last update. `stretch`: the results of real calls since the last update.
    `arrivals`: the calls that have arrived since then. `cold_s`: duration of a cold start in seconds.
    """
    ready = np.array([float(sum(r.state == "ready" for r in seen.replicas))])
    waiting, share = backtest.queue_after(ready, np.array([before.waiting]), arrivals, 1.0, stretch.passed_s, cold_s)
    predicted = float(share[0]) * stretch.calls
    recent_late = before.recent_late_share
    if stretch.calls:
        recent_late += (float(share[0]) - recent_late) * -math.expm1(-stretch.passed_s / (OVERLOAD * cold_s))
    # In an overload the number of late calls depends on the queue, and does not show that rules should hold more.
    predicted_now = max(predicted, stretch.outside * min(recent_late / EXPLAINED, 1.0))
    fade = math.exp(-stretch.passed_s / (backtest.MEMORY * cold_s))
    late, judged = before.late * fade + stretch.outside, before.calls * fade + stretch.within + stretch.outside
    predicted = before.predicted_late * fade + predicted_now
    time_s = before.time_s * fade + stretch.passed_s
    now = stretch.within + stretch.outside
    correction = before.correction
    if now:
        weight = min(now * time_s / (judged * stretch.passed_s), HEAVIEST)
        excess = max(stretch.outside - predicted_now, 0.0) / now - SHARE_OF_BUDGET * (1.0 - seen.settings.slo.target)
        correction = min(max(correction * math.exp(PACE * stretch.passed_s / cold_s * weight * excess), LEAST), MOST)
    return Fidelity(float(waiting[0]), predicted, recent_late, late, judged, time_s, correction)


def target(memory: ModelMemory, seen: ModelSeen, work: ReplicaWork, now_s: float) -> tuple[ReplicaTarget, ModelMemory]:
    """Return the replica target of the model, and the memory for the next pass. The target falls only after a time of
    low demand."""
    settings, have = seen.settings, sum(r.state != "draining" for r in seen.replicas)
    cold_s = max(settings.cold_start_s, 1.0)
    levels, rule = memory.levels, memory.rules[0] if memory.rules else None
    by_rules = 0
    if rule is not None:
        held = backtest.wanted_by_rule(levels.signals, levels.stray)[list(memory.rules)]
        by_rules = math.ceil(float(held.mean()) * memory.fidelity.correction - 1e-6)
    level = float(levels.means[2])
    raw, why = by_rules, "the cheapest rule that would have met the SLO"
    least = math.ceil(level * (1.0 + LEAST_MARGIN / math.sqrt(1.0 + levels.seen_s / (WINDOW * cold_s))) - 1e-6)
    if raw < least:
        raw, why = least, "minimum margin over the load: little demand was observed yet"
    if levels.seen_s < TRUSTED * cold_s:
        raw = math.ceil(FIRST_MARGIN * max(level, float(levels.means[1])) - 1e-6)
        why = "margin over the load: too little demand was observed yet"
    ready = sum(r.state == "ready" for r in seen.replicas)
    over_s = work.waiting_s - ready * settings.slo.ttft_s
    if over_s > 0:
        rescue = math.ceil(float(levels.means[1]) + over_s / cold_s - 1e-6)
        if rescue > raw:
            raw, why = rescue, "calls wait longer than the SLO allows"
    for_calls = _replicas_for_calls(memory, seen, work, cold_s)
    if for_calls > raw:
        raw, why = for_calls, "room for running and queued calls, and for those that may come during a cold start"
    if (work.queued or work.calls) and raw < 1:
        raw, why = 1, "there is a call to serve"
    recent_targets = (
        *((at, n) for at, n in memory.recent_targets if at > now_s - PATIENCE * cold_s - 1e-6),
        (now_s, raw),
    )
    target = raw
    if raw < have:
        kept = max(n for _, n in recent_targets)
        if levels.seen_s < BLIND * cold_s:
            target, why = have, "no scale-down yet: too little demand was observed"
        elif kept >= have:
            target, why = have, "wanted recently: keeping a replica costs less than starting it again"
        else:
            target, why = kept, "not wanted during the last patience_s"
    elif raw > have and over_s <= 0 and memory.down is not None:
        at_s, before = memory.down
        if now_s - at_s <= cold_s and raw <= before * (1.0 + HOLD) and have:
            target, why = have, "scaled down within a cold start, and little more is wanted than before that"
    numbers = {
        "load": level,
        "load_now": float(levels.means[0]),
        "expected_load": level if rule is None or rule >= FOLLOWING else float(levels.signals[rule // MARGINS]),
        "margin": raw / level if level > 0 else 0.0,
        "waiting_s": work.waiting_s,
        "rule": float(rule if rule is not None else -1),
        "rule_late_share": float(memory.backtest.late[rule] / max(memory.backtest.calls, 1.0))
        if rule is not None
        else 0.0,
        "late_share": memory.fidelity.late / max(memory.fidelity.calls, 1.0),
        "correction": memory.fidelity.correction,
        "patience_s": PATIENCE * cold_s,
        "wished": float(raw),
        "have": float(have),
        "cold_start_s": cold_s,
    }
    return ReplicaTarget(target, why, level, numbers), replace(memory, recent_targets=recent_targets)


def _replicas_for_calls(memory: ModelMemory, seen: ModelSeen, work: ReplicaWork, cold_s: float) -> int:
    """Number of replicas that can hold all running and queued calls, and the calls that may arrive before another
    replica serves.

    If streams last longer than a cold start, running calls predict the near future better than arrivals: few calls
    arrive, and their rate is not reliable.
    """
    places = seen.rates.get(seen.settings.gpus[0], Rates()).sequences
    # Calls on a draining replica end there or return to the queue.
    there = sum(r.running for r in seen.replicas if r.state != "draining") + work.queued
    if not places or not there:
        return 0
    return math.ceil((there + SPREAD * math.sqrt(memory.calls_per_s * cold_s)) / places - 1e-6)


def after_decision(memory: ModelMemory, seen: ModelSeen, decided: int, wanted: float, now_s: float) -> ModelMemory:
    """Return the policy's memory of a model after the policy has decided that the model gets `decided` replicas.
    `wanted`: number of replicas that the model asked for, which may be larger."""
    have = sum(r.state != "draining" for r in seen.replicas)
    if decided >= have:
        return memory
    return replace(memory, down=(now_s, have), cut_s=now_s if decided < wanted else memory.cut_s)
