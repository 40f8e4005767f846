"""Input and output types of the scaling policy.

All times are in seconds of one clock, the clock of `now_s` in `decide`. Names of durations end in _s too. Counts "since
the last observation" cover exactly the time between two calls of `decide`. A first observation covers
`Observation.covers_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ReplicaState = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class ClassDemand:
    """Demand of one priority class for one model: arrivals since the last observation, and the calls that wait now.

    `expected_output_tokens` is for the calls that arrived. The expected number is learnt from past calls of the tenant,
    or else is max_tokens. `held_requests` is the number of queued calls that wait because no replica is ready. Prompt
    tokens exclude the prefix that is expected to be cached.
    """

    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    expected_output_tokens: int = 0
    queued_requests: int = 0
    queued_tokens: int = 0
    """Number of prompt tokens of the queued calls."""
    oldest_wait_s: float = 0.0
    nearest_deadline_s: float | None = None
    """Nearest deadline of a queued call in seconds from now; None if no queued call has a deadline."""
    within_slo: int = 0
    """Number of calls, judged since the last observation, whose first token and pace met the `slo` of the model."""
    outside_slo: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """A replica that holds GPUs now. A replica that is only wanted is not listed."""

    replica_id: str
    state: ReplicaState
    since_s: float
    """Time when the replica entered its state."""
    gpu: str = ""
    running: int = 0
    kv_use: float = 0.0
    """Used share of the KV cache, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of one replica on one GPU type, learnt from the steps of replicas.

    The prefill rate is for a replica that only prefills, the decode rate for a replica that only decodes. A replica
    that prefills p and decodes d tokens a second is busy for p / prefill + d / decode of its time. The decode rate is
    reached with as many sequences as keep the pace of the SLO. None: not learnt yet.
    """

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    """Capacity of the KV cache of the replica, in tokens."""
    sequences: float | None = None
    """Number of sequences that the replica can run at once within the pace of the SLO."""
    gpus: int = 1
    """Number of GPUs of one replica."""


@dataclass(frozen=True, slots=True)
class Slo:
    """Service-level objective of a model.

    For a share `target` of the calls, the first token must come within `ttft_s`, and the mean gap between tokens must
    be at most `itl_s`.
    """

    ttft_s: float = 2.0
    itl_s: float = 0.1
    target: float = 0.99


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Settings of one model: values from the configuration, and learnt values of the whole model.

    `idle_s` above 0 with `min_replicas` 0: the model scales to zero after `idle_s` without a call. `gpus` lists the GPU
    types in order of preference. `manual` overrides the policy, within the GPU budget, until `manual` is withdrawn; a
    plain number is spread over the types as usual. `frozen`: the replicas of the model are not changed.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 0.0
    slo: Slo = field(default_factory=Slo)
    gpus: tuple[str, ...] = ("",)
    cold_start_s: float = 60.0
    """Time in seconds from the decision to a ready replica: the learnt time, or the configured time until a time is
    learnt."""
    manual: int | Mapping[str, int] | None = None
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class ModelSeen:
    """Observation of one model. Keys of `rates` are GPU types; keys of `demand` are class names.

    `room` is the capacity for replicas of the model by GPU type, including the existing replicas. A type that is not
    listed has enough capacity. Replicas without capacity on any type wait for the first type.
    """

    settings: ModelSettings
    demand: Mapping[str, ClassDemand] = field(default_factory=dict)
    replicas: Sequence[ReplicaSeen] = ()
    rates: Mapping[str, Rates] = field(default_factory=dict)
    room: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Observation:
    """Observation of all models.

    `ranks`: rank of each class; rank 0 is served first, and an unknown class ranks last. `gpu_budget`: number of GPUs
    by type; a type that is not listed is unlimited. `frozen` freezes every model.
    """

    models: Mapping[str, ModelSeen]
    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    frozen: bool = False
    covers_s: float = 0.0
    """Time in seconds that the arrivals cover if there is no memory. 0 means unknown; then only waiting calls count."""


@dataclass(frozen=True, slots=True)
class ReplicaDecision:
    """Decided number of replicas of one model by GPU type. Starting and ready replicas count, draining replicas do not.

    Every round has one decision for every model, even if nothing changes. `numbers` are shown by `cluster explain
    scaling`; the names of these numbers are stable.
    """

    model: str
    replicas: Mapping[str, int]
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of replicas over all GPU types."""
        return sum(self.replicas.values())
