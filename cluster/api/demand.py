"""Two kinds of reports: the demand that gateways report to the controller, and the work of engines that workers report.
Counters never decrease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Demand for one priority class of one model at one gateway.

    Five fields count since the gateway's start. `arrived_requests`: sequences that arrived.
    `arrived_prompt_tokens`: their prompt tokens, less the expected prefix-cache hits. `expected_output_tokens`:
    their expected output tokens. `within_slo`, `outside_slo`: ended calls that met or missed the model's SLO.

    The other fields are current. `queued_requests`, `queued_tokens`: waiting requests and their tokens.
    `oldest_wait_s`: the longest wait so far. `nearest_deadline_s`: seconds until the nearest deadline; None if
    no waiting request has a deadline. `held_requests`: requests that are held because no worker serves the
    model.
    """

    priority_class: str
    rank: int = 0
    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    expected_output_tokens: int = 0
    within_slo: int = 0
    outside_slo: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    oldest_wait_s: float = 0.0
    nearest_deadline_s: float | None = None
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """Demand for one model at one gateway, or summed over several gateways.

    `arrived` and `arrived_tokens` count since each gateway's start; the other numbers are current.
    """

    model: str
    waiting: int
    waiting_tokens: int
    running: int
    arrived: int
    arrived_tokens: int
    classes: tuple[ClassCounts, ...] = ()


@dataclass(frozen=True, slots=True)
class ComputedWork:
    """Work of one engine since the engine's start. `busy_s`: seconds spent in steps. `prefill_tokens`: computed prompt
    tokens. `decode_tokens`: generated tokens.

    `preemptions`, `prefix_query_tokens` and `prefix_hit_tokens` are the fields of EngineCounts. They are 0 if the
    engine does not report EngineCounts.
    """

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0


class EngineCounts(NamedTuple):
    """Counts of an engine since its start: preempted requests, prompt tokens that were looked up in the prefix cache,
    and prompt tokens that were found there."""

    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
