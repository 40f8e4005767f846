"""What the scaling policy is told and what it says.

All times are seconds of one clock, that of `now_s` in `decide`; durations end in _s too. Counts "since the last
observation" cover exactly the time between two calls of `decide`; a first observation covers `Observation.covers_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ReplicaState = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class ClassDemand:
    """What one priority class asks of one model: arrivals since the last observation, and what waits now.

    `expected_output_tokens` is of those that arrived (what the tenants' past says, else their max_tokens).
    `held_requests` are those of the queued that wait because no replica is ready. Prompt tokens are net of the
    prefix that the caches are expected to have.
    """

    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    expected_output_tokens: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    """Prompt tokens of the queued."""
    oldest_wait_s: float = 0.0
    nearest_deadline_s: float | None = None
    """From now; None where no queued call has a deadline."""
    within_slo: int = 0
    """Calls judged since the last observation: first token and pace as the model's `slo` asks."""
    outside_slo: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """One replica that holds GPUs now. Whoever is only wanted, and not yet there, is not listed."""

    replica_id: str
    state: ReplicaState
    since_s: float
    """When it entered its state."""
    gpu: str = ""
    running: int = 0
    kv_use: float = 0.0
    """In [0, 1]."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one replica on one GPU type can do, as learnt from its steps; both rates are of it doing only that.

    A replica that prefills p and decodes d tokens a second is busy for p / prefill + d / decode of its time. `decode`
    is reached with as many sequences as keep the pace of the slo. None: not learnt yet.
    """

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    """How many tokens its cache holds."""
    sequences: float | None = None
    """How many it can run at once within the pace of the slo."""
    gpus: int = 1
    """That one replica takes."""


@dataclass(frozen=True, slots=True)
class Slo:
    """First token within `ttft_s`, mean gap between tokens within `itl_s`, for a share `target` of the calls."""

    ttft_s: float = 2.0
    itl_s: float = 0.1
    target: float = 0.99


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A model's part of the configuration, and what is learnt of it as a whole.

    `idle_s` > 0 with `min_replicas` 0: to zero after so long without a call. `gpus` lists the GPU types in order of
    preference. `manual` overrides the policy (within the GPU budget) until it is taken back; a bare number goes over
    the types as any does. `frozen`: nothing changes.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 0.0
    slo: Slo = field(default_factory=Slo)
    gpus: tuple[str, ...] = ("",)
    cold_start_s: float = 60.0
    """From the decision to a ready replica, as learnt; the configuration's where nothing is learnt yet."""
    manual: int | Mapping[str, int] | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """All there is to know of one model at one moment. Keys of `rates` are GPU types, of `demand` class names.

    `room` by GPU type: how many of its replicas there are places for, those that are there among them; a type that is
    not in it has places enough. What finds no place on any type waits for the first.
    """

    settings: ModelSettings
    demand: Mapping[str, ClassDemand] = field(default_factory=dict)
    replicas: Sequence[ReplicaSeen] = ()
    rates: Mapping[str, Rates] = field(default_factory=dict)
    room: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """All models. `ranks`: of classes, 0 is served first; an unknown class ranks last. `frozen` freezes everything.

    `gpu_budget` by GPU type; a type that is not in it is not limited.
    """

    models: Mapping[str, ModelSeen]
    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    frozen: bool = False
    covers_s: float = 0.0
    """How long the arrivals were counted where there is no memory; 0: not known, then only what waits counts."""


@dataclass(frozen=True, slots=True)
class ReplicaDecision:
    """How many replicas a model is to have, by GPU type: starting and ready ones, not those that drain.

    There is one for every model in every round, also where nothing changes. `numbers` are what `cluster explain
    scaling` shows; their names are stable.
    """

    model: str
    replicas: Mapping[str, int]
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Over all GPU types."""
        return sum(self.replicas.values())
