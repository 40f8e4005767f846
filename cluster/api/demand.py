"""What gateways tell the controller of demand, and workers of what they have computed. Counters only grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """One priority class of one model at one gateway.

    Counters since the gateway's start: the sequences that have come, their prompt tokens net of what caches are
    expected to hold, the tokens that they are expected to generate, and the calls that ended within and outside the
    model's objectives. The rest is of now: what waits, for how long at most, how long until the nearest deadline (None:
    there is none), and how many of them wait because nobody serves the model.
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
    """What one engine has computed since its start: steps, the time in them, prompt tokens, and generated tokens."""

    steps: int = 0
    busy_s: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
