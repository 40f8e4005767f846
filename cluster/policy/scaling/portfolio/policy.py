"""Scaling policy: the number of replicas of every model, within the bounds of the model and within the available
GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.policy.scaling.portfolio.gpu_budget import GpuClaim, share
from cluster.policy.scaling.portfolio.gpu_equivalence import as_one_type, round_up, total_worth
from cluster.policy.scaling.portfolio.memory import Memory, ModelMemory
from cluster.policy.scaling.portfolio.replica_target import (
    ReplicaTarget,
    ReplicaWork,
    after_decision,
    learn,
    target,
    work_of,
)
from cluster.policy.scaling.portfolio.types import ModelSeen, Observation, ReplicaDecision


def decide(observation: Observation, memory: Memory, now_s: float) -> tuple[tuple[ReplicaDecision, ...], Memory]:
    """Decide the number of replicas of every model.

    Returns the decisions, and the memory to pass in with the next observation.
    """
    passed_s = max(now_s - memory.at_s, 0.0) if memory.at_s is not None else observation.covers_s
    claims, kept = [], {}
    for name, seen in observation.models.items():
        before = memory.models.get(name, ModelMemory(now_s))
        claim, kept[name] = _claim(name, seen, observation, before, passed_s, now_s)
        claims.append(claim)
    decisions = share(claims, observation.gpu_budget)
    for decision in decisions:
        seen = observation.models[decision.model]
        decided = round_up(total_worth(seen, decision.replicas))
        wanted = decision.numbers["wanted"]
        kept[decision.model] = after_decision(kept[decision.model], as_one_type(seen), decided, wanted, now_s)
    return decisions, Memory(now_s, kept)


def _claim(
    name: str, seen: ModelSeen, observation: Observation, before: ModelMemory, passed_s: float, now_s: float
) -> tuple[GpuClaim, ModelMemory]:
    settings, demand = seen.settings, seen.demand.values()
    have: dict[str, int] = {}
    for replica in seen.replicas:
        if replica.state != "draining":
            have[replica.gpu] = have.get(replica.gpu, 0) + 1
    called = any(d.arrived_requests or d.queued_requests for d in demand)
    runs = any(replica.running for replica in seen.replicas if replica.state != "draining")
    after = replace(before, last_call_s=now_s) if called or runs else before
    alike = as_one_type(seen)
    work = work_of(alike, observation.ranks)
    if work is None:
        goal, work = _unlearnt(alike, called), ReplicaWork(0.0, 0.0, 0.0, {}, 0, 0, 0, 0, 0)
    else:
        after = learn(after, alike, work, passed_s, now_s)
        goal, after = target(after, alike, work, now_s)
    wanted, why, idle_s = goal.replicas, goal.why, now_s - after.last_call_s
    numbers = dict(goal.numbers, idle_s=idle_s)
    floor = settings.min_replicas
    if floor == 0 and not (settings.idle_s > 0 and idle_s >= settings.idle_s):
        if have or called:
            floor = 1  # a running model keeps one replica until the model has been idle for long enough
    elif floor == 0 and not called:
        wanted, why = 0, "idle"
    if wanted < floor:
        wanted, why = floor, "min_replicas of the entry" if settings.min_replicas else "not idle for idle_s yet"
    if wanted > settings.max_replicas:
        wanted, why = settings.max_replicas, "max_replicas of the entry"
    there = max(round_up(total_worth(seen, have)), settings.min_replicas)
    if after.cut_s is not None and now_s - after.cut_s <= settings.cold_start_s and there < wanted:
        wanted, why = there, "its replicas went to other models within a cold start, and do not serve there yet"
    fixed: int | Mapping[str, int] | None = None
    if settings.manual is not None:
        fixed, why = settings.manual, "manual"
    if observation.frozen or settings.frozen:
        fixed, why = have, "frozen"
    return GpuClaim(
        name,
        seen,
        have,
        wanted,
        min(settings.min_replicas, wanted),
        goal.load,
        work.waiting_s,
        after.ranks,
        after.calls_per_s,
        after.gains,
        fixed,
        why == "frozen",
        why,
        numbers,
    ), after


def _unlearnt(seen: ModelSeen, called: bool) -> ReplicaTarget:
    """Return the target of a model whose rates are not learnt yet.

    The target is the present number of replicas, but at least 1 if there are calls (`called`). It is one more if calls
    wait too long or are late, and no replica is starting.
    """
    have = sum(r.state != "draining" for r in seen.replicas)
    starting = any(r.state == "starting" for r in seen.replicas)
    waits = max((d.oldest_wait_s for d in seen.demand.values()), default=0.0)
    late = sum(d.outside_slo for d in seen.demand.values())
    if have and not starting and (waits > seen.settings.slo.ttft_s / 2 or late):
        return ReplicaTarget(have + 1, "rates are not learnt yet, and calls wait or are late", 0.0, {})
    return ReplicaTarget(max(have, int(called)), "rates are not learnt yet", 0.0, {})
