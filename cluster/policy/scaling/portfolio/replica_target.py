"""How many replicas one model wishes for, from what it has seen of its demand; the budget is not looked at here.

Up: what the followed rule (backtest.py) wants, at once. Down: only what has not been wished for during the model's
patience: about half a cold start, since to keep a replica for a whole one costs as much as to start it again (ski
rental).
After a scale-down nothing is started for a cold start unless calls wait too long or far more is wished for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cluster.policy.scaling.portfolio import backtest, forecast, marginal_gain
from cluster.policy.scaling.portfolio.backtest import FOLLOWING, MARGINS, Came
from cluster.policy.scaling.portfolio.memory import Fidelity, ModelMemory, Past, Stretch
from cluster.policy.scaling.portfolio.types import ModelSeen, Rates

STRETCHES = 24
"""A cold start is learnt in so many pieces or fewer."""
TRUSTED = 5.0
"""Cold starts of demand before the rules alone decide."""
BLIND = 2.0
"""Cold starts of demand before anything leaves: till then nothing is known of what comes."""
FIRST_MARGIN = 1.4
WINDOW = 60.0
"""Cold starts over which the slo's budget of late calls is one: an hour, where a start takes a minute."""
LEAST_MARGIN = 0.2
"""Over the mean of a cold start, below which no rule goes while nothing is known; it falls with the root of the time
seen, by WINDOW. As much as public traces move within a cold start, most of the time."""
SHARE_OF_BUDGET = 0.75
"""Of the calls that may be late, those that rules may spend, less what came late that no rule foresaw; and what such
calls are brought to by the correction."""
PACE = 0.12
"""The correction's exponent grows by this in a cold start of which all calls are late that the shadow served in time,
and falls by as much of it in each as the budget is of all calls: so long as it is within its bounds such calls come to
the budget, whatever the demand does. A correction by the mean of two hours swung between 1 and 2, for it rose till long
after it was enough. Source: Gibbs and Candes, Adaptive Conformal Inference Under Distribution Shift (2021)."""
HEAVIEST = 4.0
"""A stretch weighs what its calls are against the mean, at most this."""
LEAST, MOST = 1.0, 2.0
"""Of the correction."""
DOUBT = 0.07
"""Rules are tried on more than came, by this over the root of how many cold starts were seen: the cheapest of many
rules owes some of its luck to the past that it was chosen by."""
PATIENCE = 0.45
"""Cold starts for which a replica is kept that is not wished for; signals fall at a pace of their own besides."""
HOLD = 0.25
"""Within a cold start of a scale-down no more is started for a wish of up to this above what was there: margins are for
that, and a start would not serve before the swing is over."""
OVERLOAD = 2.0
"""Cold starts over which it is counted whether the shadow saw an overload: calls are judged a while after they came."""
EXPLAINED = 0.1
"""Of the calls: where the shadow tells so many late, it foresaw all that were."""
STREAMS = 1 / 3
"""Cold starts over which the decoding of running streams is counted: about as long as a stream lasts."""
BEHIND = 0.05
"""Of the decoding that comes while a stream lasts at the slo's pace: so much may pile up before streams are slower than
that. With 0.2 the shadow told next to none of the 0.7 % of ServeGen's streams that were slow."""
UNKNOWN_RANK = 1 << 10
SPREAD = 3.0
"""Standard deviations of the number of calls that come in a cold start, for which there is to be room."""


@dataclass(frozen=True, slots=True)
class ReplicaTarget:
    """`replicas` of the first GPU type. `load` is what is expected, `now` what arrives, both in replicas."""

    replicas: int
    why: str
    load: float
    numbers: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ReplicaWork:
    """What came in one observation, in replica-seconds of the first GPU type. None: no rates are known."""

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
    """Of output, expected."""


def work_of(seen: ModelSeen, ranks: Mapping[str, int]) -> ReplicaWork | None:
    """None where the rates of the first GPU type are not learnt yet."""
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
    """With what came since the last observation."""
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


def _learn_stretch(memory: ModelMemory, seen: ModelSeen, one: Stretch, cold_s: float, now_s: float) -> ModelMemory:
    slo = seen.settings.slo
    load = one.load_s / one.passed_s
    own_s = one.prompt_s / one.calls if one.calls else 0.0
    came = Came(
        load,
        one.calls,
        max(slo.ttft_s - 2.0 * own_s, slo.ttft_s / 4),
        memory.output * memory.tokens * slo.itl_s * BEHIND,
    )
    kept = [p for p in memory.past if p.at_s >= now_s - max(PATIENCE, 1.0) * cold_s - 1e-6]
    past = [p for p in kept if p.at_s >= now_s - cold_s - 1e-6]
    aged = bool(past) and past[0].at_s <= now_s - cold_s + 1.5 * one.passed_s
    following = forecast.follow(
        memory.levels, load, one.passed_s, cold_s, (past[0].means, past[0].signals) if aged else None
    )
    patient = [p.signals for p in kept if p.at_s >= now_s - PATIENCE * cold_s - 1e-6]
    plans = np.maximum.reduce([following.signals, *patient])
    least = np.minimum.reduce([plans, *(p.plans for p in past)])
    kept.append(Past(now_s, following.means, following.signals, plans))
    wanted = backtest.whole(backtest.held(plans, following.stray), 1.0)
    ready = backtest.whole(backtest.held(least, following.stray), 1.0)
    played = memory.shadow
    # Before that every rule would be blamed for a beginning that none foresaw.
    if memory.levels.seen_s >= BLIND * cold_s:
        blocks = max(memory.shadow.time_s / cold_s, 1.0)
        doubt = 1.0 + DOUBT / math.sqrt(blocks)
        played = backtest.played(memory.shadow, wanted, ready, came, doubt, one.passed_s, cold_s)
    fidelity = _check(memory.fidelity, seen, one, came, cold_s)
    budget = 1.0 - slo.target
    unforeseen = max(fidelity.late - fidelity.told, 0.0) / max(fidelity.calls, 1.0)
    share = min(max(SHARE_OF_BUDGET * budget - unforeseen, 0.1 * budget), budget)
    # The budget of the window is there while what really became of calls has not spent it.
    ahead = max(WINDOW * cold_s / max(played.time_s, 1e-9), 1.0)
    spent = fidelity.late / max(fidelity.calls, 1.0) / (budget * ahead)
    ahead = 1.0 + (ahead - 1.0) * max(1.0 - spent, 0.0)
    rules = backtest.best(played, share, ahead) if played.time_s else ()
    won = marginal_gain.played(memory.gains, came, one.passed_s, cold_s)
    return replace(memory, levels=following, shadow=played, gains=won, past=tuple(kept), rules=rules, fidelity=fidelity)


def _check(before: Fidelity, seen: ModelSeen, one: Stretch, came: Came, cold_s: float) -> Fidelity:
    """Play the real replicas in the shadow, and compare with what really became of calls."""
    ready = np.array([float(sum(r.state == "ready" for r in seen.replicas))])
    waiting, share = backtest.line(ready, np.array([before.waiting]), came, 1.0, one.passed_s, cold_s)
    told = float(share[0]) * one.calls
    lately = before.lately
    if one.calls:
        lately += (float(share[0]) - lately) * -math.expm1(-one.passed_s / (OVERLOAD * cold_s))
    # How many are late in an overload is the queue's matter; it says nothing against rules that hold more.
    told_now = max(told, one.outside * min(lately / EXPLAINED, 1.0))
    fade = math.exp(-one.passed_s / (backtest.MEMORY * cold_s))
    late, judged = before.late * fade + one.outside, before.calls * fade + one.within + one.outside
    told = before.told * fade + told_now
    time_s = before.time_s * fade + one.passed_s
    now = one.within + one.outside
    correction = before.correction
    if now:
        weight = min(now * time_s / (judged * one.passed_s), HEAVIEST)
        excess = max(one.outside - told_now, 0.0) / now - SHARE_OF_BUDGET * (1.0 - seen.settings.slo.target)
        correction = min(max(correction * math.exp(PACE * one.passed_s / cold_s * weight * excess), LEAST), MOST)
    return Fidelity(float(waiting[0]), told, lately, late, judged, time_s, correction)


def wish(memory: ModelMemory, seen: ModelSeen, work: ReplicaWork, now_s: float) -> tuple[ReplicaTarget, ModelMemory]:
    """How many replicas, with patience."""
    settings, have = seen.settings, sum(r.state != "draining" for r in seen.replicas)
    cold_s = max(settings.cold_start_s, 1.0)
    following, rule = memory.levels, memory.rules[0] if memory.rules else None
    rules_say = 0
    if rule is not None:
        held = backtest.held(following.signals, following.stray)[list(memory.rules)]
        rules_say = math.ceil(float(held.mean()) * memory.fidelity.correction - 1e-6)
    level = float(following.means[2])
    raw, why = rules_say, "the cheapest rule that would have kept the slo"
    least = math.ceil(level * (1.0 + LEAST_MARGIN / math.sqrt(1.0 + following.seen_s / (WINDOW * cold_s))) - 1e-6)
    if raw < least:
        raw, why = least, "a margin over the load, as long as little is known"
    if following.seen_s < TRUSTED * cold_s:
        raw = math.ceil(FIRST_MARGIN * max(level, float(following.means[1])) - 1e-6)
        why = "little is known yet: a margin over the load"
    ready = sum(r.state == "ready" for r in seen.replicas)
    over_s = work.waiting_s - ready * settings.slo.ttft_s
    if over_s > 0:
        rescue = math.ceil(float(following.means[1]) + over_s / cold_s - 1e-6)
        if rescue > raw:
            raw, why = rescue, "calls wait for longer than the slo allows"
    crowd = _crowd(memory, seen, work, cold_s)
    if crowd > raw:
        raw, why = crowd, "as many run and wait, and as many more may come while a replica starts"
    if (work.queued or work.calls) and raw < 1:
        raw, why = 1, "a call is there"
    wishes = (*((at, n) for at, n in memory.wishes if at > now_s - PATIENCE * cold_s - 1e-6), (now_s, raw))
    target = raw
    if raw < have:
        kept = max(n for _, n in wishes)
        if following.seen_s < BLIND * cold_s:
            target, why = have, "nothing leaves while little is known"
        elif kept >= have:
            target, why = have, "wished for lately: to keep it costs less than to start it again"
        else:
            target, why = kept, "not wished for during the patience"
    elif raw > have and over_s <= 0 and memory.down is not None:
        at_s, before = memory.down
        if now_s - at_s <= cold_s and raw <= before * (1.0 + HOLD) and have:
            target, why = have, "something left within a cold start, and little more is wished for than was there"
    numbers = {
        "load": level,
        "load_now": float(following.means[0]),
        "expected_load": level if rule is None or rule >= FOLLOWING else float(following.signals[rule // MARGINS]),
        "margin": raw / level if level > 0 else 0.0,
        "waiting_s": work.waiting_s,
        "rule": float(rule if rule is not None else -1),
        "rule_late_share": float(memory.shadow.late[rule] / max(memory.shadow.calls, 1.0)) if rule is not None else 0.0,
        "late_share": memory.fidelity.late / max(memory.fidelity.calls, 1.0),
        "correction": memory.fidelity.correction,
        "patience_s": PATIENCE * cold_s,
        "wished": float(raw),
        "have": float(have),
        "cold_start_s": cold_s,
    }
    return ReplicaTarget(target, why, level, numbers), replace(memory, wishes=wishes)


def _crowd(memory: ModelMemory, seen: ModelSeen, work: ReplicaWork, cold_s: float) -> int:
    """Replicas in which all have a place that run and wait now, and as many more as chance may bring before another
    replica would serve. Where streams last longer than a start, what runs tells more of the next minute than what
    comes: few long calls are no rate."""
    places = seen.rates.get(seen.settings.gpus[0], Rates()).sequences
    # What runs on a replica that leaves ends there, or comes back into the line.
    there = sum(r.running for r in seen.replicas if r.state != "draining") + work.queued
    if not places or not there:
        return 0
    return math.ceil((there + SPREAD * math.sqrt(memory.calls_per_s * cold_s)) / places - 1e-6)


def remembered(memory: ModelMemory, seen: ModelSeen, decided: int, wanted: float, now_s: float) -> ModelMemory:
    """After the decision. `wanted`: what was asked of the budget."""
    have = sum(r.state != "draining" for r in seen.replicas)
    if decided >= have:
        return memory
    return replace(memory, down=(now_s, have), cut_s=now_s if decided < wanted else memory.cut_s)
