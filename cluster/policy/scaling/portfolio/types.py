"""Input and output types of the scaling policy.

All times are seconds of one clock, that of `now_s` in `decide`; names of durations end in _s too. Counts "since the
last observation" cover exactly the time between two calls of `decide`; a first observation covers
`Observation.covers_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ReplicaState = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class ClassDemand:
    """Demand of one priority class for one model: arrivals since the last observation, and what waits now.

    `expected_output_tokens` is for the calls that arrived (learnt from the tenant's past, else max_tokens).
    `held_requests` are those of the queued that wait because no replica is ready. Prompt tokens exclude the prefix that
    is expected to be cached.
    """

    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    expected_output_tokens: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    """Prompt tokens of the queued calls."""
    oldest_wait_s: float = 0.0
    nearest_deadline_s: float | None = None
    """Seconds from now; None if no queued call has a deadline."""
    within_slo: int = 0
    """Calls judged since the last observation whose first token and pace met the model's `slo`."""
    outside_slo: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """One replica that holds GPUs now. Replicas that are only wanted are not listed."""

    replica_id: str
    state: ReplicaState
    since_s: float
    """Time when it entered its state."""
    gpu: str = ""
    running: int = 0
    kv_use: float = 0.0
    """Used share of the KV cache, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one replica on one GPU type, learnt from its steps. Each rate is for a replica that does only that.

    A replica that prefills p and decodes d tokens a second is busy for p / prefill + d / decode of its time. `decode`
    is reached with as many sequences as keep the SLO's pace. None: not learnt yet.
    """

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    """Capacity of its KV cache in tokens."""
    sequences: float | None = None
    """Sequences that it can run at once within the SLO's pace."""
    gpus: int = 1
    """GPUs of one replica."""


@dataclass(frozen=True, slots=True)
class Slo:
    """First token within `ttft_s`, mean gap between tokens within `itl_s`, for a share `target` of the calls."""

    ttft_s: float = 2.0
    itl_s: float = 0.1
    target: float = 0.99


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """A model's part of the configuration, and learnt values of the whole model.

    `idle_s` > 0 with `min_replicas` 0: scale to zero after so long without a call. `gpus` lists the GPU types in order
    of preference. `manual` overrides the policy (within the GPU budget) until it is withdrawn; a plain number is spread
    over the types like any other. `frozen`: nothing changes.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 0.0
    slo: Slo = field(default_factory=Slo)
    gpus: tuple[str, ...] = ("",)
    cold_start_s: float = 60.0
    """Seconds from the decision to a ready replica: the learnt value, or the configured one until there is one."""
    manual: int | Mapping[str, int] | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """Observation of one model. Keys of `rates` are GPU types, those of `demand` class names.

    `room`: capacity for the model's replicas by GPU type, including the existing ones; a type that is not listed has
    enough. Replicas without capacity on any type wait for the first one.
    """

    settings: ModelSettings
    demand: Mapping[str, ClassDemand] = field(default_factory=dict)
    replicas: Sequence[ReplicaSeen] = ()
    rates: Mapping[str, Rates] = field(default_factory=dict)
    room: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """Observation of all models. `ranks`: ranks of the classes, 0 is served first; an unknown class ranks last.

    `gpu_budget` is by GPU type; a type that is not listed is unlimited. `frozen` freezes every model.
    """

    models: Mapping[str, ModelSeen]
    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    frozen: bool = False
    covers_s: float = 0.0
    """Time covered by the arrivals if there is no memory; 0: unknown, then only waiting calls count."""


@dataclass(frozen=True, slots=True)
class ReplicaDecision:
    """Replicas that a model should have, by GPU type: starting and ready ones, without draining ones.

    There is one for every model in every round, even if nothing changes. `numbers` are shown by `cluster explain
    scaling`; their names are stable.
    """

    model: str
    replicas: Mapping[str, int]
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Replicas over all GPU types."""
        return sum(self.replicas.values())
