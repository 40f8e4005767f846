"""Input and output types of the scaling policy.

All times are in seconds of one clock, the clock of `now_s` in `decide`. Names of times and of durations end in _s.
Counts "since the last observation" cover the time between two calls of `decide`; in a first observation they cover
`Observation.covers_s`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

ReplicaState = Literal["starting", "ready", "draining"]


@dataclass(frozen=True, slots=True)
class ClassDemand:
    """Demand of one priority class for one model: calls since the last observation, and calls that wait now.

    `expected_output_tokens`: expected output of the calls that arrived; gateways predict it from earlier calls.
    `held_requests`: queued calls that wait because no replica is ready. The numbers of prompt tokens leave out the
    tokens that are expected to be cached.
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
    """Number of calls, judged since the last observation, that met both times of the model's `slo`."""
    outside_slo: int = 0
    held_requests: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """A replica that holds GPUs now. Replicas that are wanted but have no GPUs yet are not listed."""

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
    """Throughput of one replica on one GPU type, learnt from the engine steps of replicas. None: not learnt yet.

    The prefill rate is for a replica that only prefills. The decode rate is for a replica that only decodes, with as
    many sequences as the SLO's `itl_s` allows. A replica that prefills p tokens and decodes d tokens a second is busy
    for p / prefill rate + d / decode rate of its time.
    """

    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    kv_tokens: int | None = None
    """Capacity of the KV cache of the replica, in tokens."""
    sequences: float | None = None
    """Number of sequences that the replica can run at once within the SLO's `itl_s`."""
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

    If `idle_s` is above 0 and `min_replicas` is 0, the model scales to zero after `idle_s` seconds without a call.
    `gpus`: GPU types in order of preference. `manual`: number of replicas that an operator has set, in total or by GPU
    type. It replaces the policy's target, within the GPU budget; None: not set. `frozen`: the replicas of the model are
    not changed.
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
    """Observation of one model. The keys of `rates` are GPU types; the keys of `demand` are class names.

    `room`: number of the model's replicas that fit on each GPU type, existing replicas included; a type without an
    entry has enough capacity. Replicas that fit on no type wait for GPUs of the first type.
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
    by type; a type that is not listed is unlimited. `frozen`: whether the numbers of replicas of all models must stay
    the same.
    """

    models: Mapping[str, ModelSeen]
    gpu_budget: Mapping[str, int] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    frozen: bool = False
    covers_s: float = 0.0
    """Seconds that the arrivals cover in a first observation. 0: unknown, so that only waiting calls count."""


@dataclass(frozen=True, slots=True)
class ReplicaDecision:
    """Decided number of replicas of one model, by GPU type. Starting and ready replicas count, draining replicas do
    not.

    Each call of `decide` returns one decision for every model, even if nothing changes. `numbers` are shown by
    `headrace explain scaling`; the names of these numbers are stable.
    """

    model: str
    replicas: Mapping[str, int]
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of replicas over all GPU types."""
        return sum(self.replicas.values())
