"""The scaling policy. A first cut: within the bounds, manual, frozen, to and from zero; by load alone."""

from __future__ import annotations

import math

from cluster.control.scaling.memory import Memory, ModelMemory
from cluster.control.scaling.types import Decision, ModelSeen, Observation


def decide(observation: Observation, memory: Memory, now_s: float) -> tuple[tuple[Decision, ...], Memory]:
    """One decision for every model, and what to hand in with the next observation."""
    decisions, remembered = [], {}
    for name, seen in observation.models.items():
        before = memory.models.get(name)
        called = any(d.arrived_requests or d.queued_requests for d in seen.demand.values())
        last_call_s = now_s if called or before is None else before.last_call_s
        passed = now_s - memory.at_s if memory.at_s is not None else observation.covers_s
        remembered[name] = ModelMemory(last_call_s)
        decisions.append(_one(name, seen, observation, passed, now_s - last_call_s))
    return tuple(decisions), Memory(now_s, remembered)


def _one(name: str, seen: ModelSeen, observation: Observation, passed_s: float, idle_s: float) -> Decision:
    settings = seen.settings
    held = [r for r in seen.replicas if r.state != "draining"]
    have: dict[str, int] = {}
    for replica in held:
        have[replica.gpu] = have.get(replica.gpu, 0) + 1
    gpu = settings.gpus[0]
    if observation.frozen or settings.frozen:
        return Decision(name, have, "frozen")
    if settings.manual is not None:
        manual = {gpu: settings.manual} if isinstance(settings.manual, int) else dict(settings.manual)
        return Decision(name, manual, "manual")
    wanted = len(held)
    rates = seen.rates.get(gpu)
    if rates is not None and rates.prefill_tokens_per_s and rates.decode_tokens_per_s and passed_s > 0:
        load = sum(
            d.arrived_prompt_tokens / rates.prefill_tokens_per_s + d.expected_output_tokens / rates.decode_tokens_per_s
            for d in seen.demand.values()
        )
        wanted = math.ceil(load / passed_s / 0.7)
    if settings.min_replicas == 0 and settings.idle_s > 0 and idle_s >= settings.idle_s:
        wanted = 0
    queued = any(d.queued_requests for d in seen.demand.values())
    wanted = max(wanted, 1 if queued else 0, settings.min_replicas)
    if settings.min_replicas == 0 and settings.idle_s > 0 and idle_s < settings.idle_s and held:
        wanted = max(wanted, 1)
    return Decision(name, {gpu: min(wanted, settings.max_replicas)}, "load", {"idle_s": idle_s})
