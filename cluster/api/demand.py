"""Demand that gateways report to the controller, and computed work that workers report. Counters never decrease."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """Demand for one priority class of one model at one gateway.

    Counted since the gateway's start: sequences that arrived, their prompt tokens less those that a prefix cache is
    expected to hold, the tokens they are expected to generate, and the calls that ended within and outside the model's
    SLO. Current values: queued requests and tokens, the longest wait so far, the time to the nearest deadline (None
    where no request has one), and how many requests are held because no worker serves the model.
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
    """A model's demand at one gateway, or summed over several; `arrived` counts since each gateway's start."""

    model: str
    waiting: int
    waiting_tokens: int
    running: int
    arrived: int
    arrived_tokens: int
    classes: tuple[ClassCounts, ...] = ()


@dataclass(frozen=True, slots=True)
class ComputedWork:
    """Work of one engine since its start: steps, seconds spent in them, prompt tokens and generated tokens."""

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
