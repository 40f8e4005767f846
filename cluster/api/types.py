"""Types that travel between the packages. Token ids are ints in [0, vocab_size); times are seconds, monotonic."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


class FinishReason(enum.IntEnum):
    """Reason for which the engine ended a request; the numbers are those of link.v1 Finish.Reason."""

    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    REPETITION = 5


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output. Exactly one of kinds json_schema, json_object, regex, choice, grammar.

    `value` is the schema, expression or grammar text; for choice the sequence of strings; for json_object "".
    """

    kind: str
    value: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Engine-level sampling parameters, complete: the model's defaults are already in. Stop strings are the gateway's.

    `logprobs`: None none, 0 of the sampled token only, k of the k most likely too. `top_k` 0 is off.
    `stop_token_ids` are the caller's; the engine adds the generation config's EOS ids unless `ignore_eos`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None

    @property
    def is_seeded(self) -> bool:
        """Return whether tokens are drawn with the caller's seed: a greedy call draws nothing."""
        return self.seed is not None and self.temperature > 0


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """Request for one sequence. `request_id` is unique for the life of the engine (a duplicate is refused)."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: Sampling
    emitted_token_ids: Sequence[int] = ()
    cache_salt: str = ""
    priority: int = 0
    adapter: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log probabilities at one output position: the sampled token first, then the most likely ones in order."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(slots=True)
class TokenOutput:
    """Output of one engine step for one request. Not frozen: one is made for each token, and freezing costs."""

    request_id: str
    token_ids: Sequence[int]
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    """The one of Sampling.stop_token_ids that ended it; None when EOS or length did."""
    prompt_tokens: int | None = None
    """With the first output only."""
    cached_tokens: int | None = None
    """Prompt tokens taken from the prefix cache; with the first output only."""
    origin_lost: bool = False
    """Of a resumed call, with its first output: the gateway that it was resumed from is lost, as far as its worker can
    tell, or the request had never stopped."""
    logprobs: Sequence[PositionLogprobs] | None = None
    message: str = ""
    """With finish ERROR: what happened, for logs."""


RESUME_EXACT = "resume:exact"
"""Capability: emitted tokens are taken as output, every parameter goes on as if there had been no cut, and the numbers
do not depend on how tokens are batched: the tokens are those of the uncut call."""

RESUME_STATE = "resume:state"
"""Capability: as RESUME_EXACT, but for the numbers: the state and the noise are those of the uncut call, and its tokens
are too, except that they may part where two tokens are nearly as likely."""

RESUME_PLAIN = "resume:plain"
"""Capability: emitted tokens are taken as prompt; with frequency or presence penalty, seed or grammar it refuses."""

RESUME_WORDS = (RESUME_PLAIN, RESUME_STATE, RESUME_EXACT)
"""Each engine has one of them; the first promises least."""


def resume_word(capabilities: Iterable[str]) -> str:
    """Return the word among these that promises least; empty where there is none."""
    found = set(capabilities)
    return next((word for word in RESUME_WORDS if word in found), "")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Properties of an engine, fixed once it has started."""

    engine_class: str
    """dtype, quantization and parallelism in one word, e.g. `float32-tp2-pp1`: equal classes compute alike."""
    engine_path: str
    """`fastpath`, `public` (with `engine_path_reason`) or `sim`."""
    engine_version: str
    block_size: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    """The generation config's sampling fields that differ from vLLM's own defaults, by vLLM's names."""
    engine_path_reason: str = ""
    capabilities: tuple[str, ...] = ()

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        return self.block_size * self.kv_blocks


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Load of an engine now. `steps` only grows; `kv_usage` in [0, 1]; `step_s` the last step's length.

    A step that stands (`running` above 0, `steps` the same, `step_age_s` far beyond `step_p99_s`) is a hang unless
    `busy` says what the engine is at: `start`, `prefill`, `grammar`, `adapter`, or `cpu` where it gets no core. It says
    so only while that work can explain the time that the step has taken, so an engine that hangs with a full queue soon
    states no work.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    busy: str = ""
    step_age_s: float = 0.0
    """For how long the step under way has run; 0 when there is nothing to do."""
    step_p99_s: float = 0.0
    """Of the last few thousand steps; 0 before the first."""
    prefill_tokens: int = 0
    """Tokens of the prompts that have no output yet, those in the engine's queue included."""


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Identity of a worker; EngineInfo has the properties of its engine."""

    worker_id: str
    incarnation: str
    model: str
    version: str = ""
    weight_digest: str = ""
    bundle_digest: str = ""
    ray_cluster: str = "local"
    node: str = ""
    generation: str = ""
    """Digest of what its replica was started with; empty where nobody has said."""
    pod: str = ""
    """Empty outside Kubernetes."""
    host: str = ""
    """Kubernetes' name of the pod's node, outside Kubernetes the host's name; `node` is Ray's id."""
    gpu: str = ""
    """The accelerators' type; empty without any."""


_NOISE = re.compile(r"(-pp\d+)-[a-z0-9]+$")


def without_noise(engine_class: str) -> str:
    """Return an engine class without what a seed draws, its part behind the ranks (worker/engine/vllm/resume.py), if it
    has one."""
    return _NOISE.sub(r"\1", engine_class)


@dataclass(frozen=True, slots=True)
class CompatibilityKey:
    """Properties that two workers must share for one to go on with what the other has begun: weights, tokenizer, and
    the engine's arithmetic (dtype, quantization, parallelism). What a seed draws is part of it for seeded calls
    alone."""

    weight_digest: str
    bundle_digest: str
    engine_class: str

    @property
    def unseeded(self) -> CompatibilityKey:
        """The likeness without what a seed draws: of a call that needs no noise in particular."""
        return CompatibilityKey(self.weight_digest, self.bundle_digest, without_noise(self.engine_class))

    def can_continue(self, begun: CompatibilityKey) -> bool:
        """Return whether a worker like this may go on with a call that needs the likeness `begun`."""
        return begun in (self, self.unseeded)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's entry of the configuration, as control, rayserve and engine see it. Survives a trip through JSON.

    `engine` holds vLLM's own argument names, already checked for those that Headrace owns. `gpu` is Ray's
    accelerator type, empty for any. `idle_s` > 0 with `min_replicas` 0: no replica after so long without a call.
    """

    name: str
    source: str
    aliases: tuple[str, ...] = ()
    version: str = "v1"
    revision: str = ""
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    idle_s: float = 0.0
    gpu: str = ""
    engine: Mapping[str, object] = field(default_factory=dict)
    allow_cross_node_tensor_parallel: bool = False
    trust_remote_code: bool = False
    load_format: str = "safetensors"
    digest: str = ""
    """The weights' digest that every worker must have; empty for any."""
    license: str = ""
    """What the entry says of its weights' licence, by its SPDX name in lower case; empty: what the folder says."""
    ray: str = ""
    """The Ray cluster that it runs on, by its name; empty for the first."""
    fallback: tuple[str, ...] = ()
    """Models that take its calls while it has no worker that is ready, the first that has one."""
    weight: float = 1.0
    """This version's part of the model's calls, in [0, 1]; those of all its versions add up to 1."""
    error_ratio: float = 0.0
    """Of a version on trial: it goes when its calls fail so many times as often as the other's; 0: never."""
    ttft_ratio: float = 0.0
    """The same for its time to the first token."""
    slo_ttft_s: float = 2.0
    """The first token of a call is to come within this, the mean gap between its tokens is to be within the next, for
    such a share of the calls."""
    slo_itl_s: float = 0.1
    slo_target: float = 0.99

    @property
    def replicas(self) -> int:
        """Replicas to begin with: one at least, since it is the first that tells what the model is."""
        return max(self.min_replicas, 1)


class DrainState(enum.StrEnum):
    """Attitude of a worker to new work; the names are those of link.v1 Standing.State."""

    SERVING = "SERVING"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    DRAINED = "DRAINED"


class ModelState(enum.StrEnum):
    """Stage of a model's life; the names of inference.proto's Model.State without prefix."""

    DECLARED = "DECLARED"
    PLACING = "PLACING"
    LOADING = "LOADING"
    READY = "READY"
    DRAINING = "DRAINING"
    FAILED = "FAILED"
    GONE = "GONE"
    IDLE = "IDLE"


@dataclass(frozen=True, slots=True)
class VersionShare:
    """Version of a model as the gateways are told it. `weight` in [0, 1]: its part of the calls."""

    version: str
    weight: float = 1.0
    revision: str = ""
    state: ModelState = ModelState.DECLARED
    state_reason: str = ""
    bundle_digest: str = ""
    weight_digests: tuple[str, ...] = ()
    weights_pinned: bool = False
    replicas: int = 0
    replicas_desired: int = 0
    quarantined: bool = False
    """It gets no new call, and what runs there goes on elsewhere where that is possible."""
    ttft_ratio: float = 0.0
    """Of a version on trial: gateways count how often its first token takes longer than so many times another's."""


@dataclass(frozen=True, slots=True)
class VersionTally:
    """Counts of one version by one gateway since its own start. `errors`: calls that failed by the worker's fault.

    `pairs`: calls whose first token was compared with the last one's of the version that stays; in `slower` of them it
    took more than the version's ttft_ratio times as long.
    """

    model: str
    version: str
    generation: str
    calls: int = 0
    errors: int = 0
    pairs: int = 0
    slower: int = 0


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model as the controller tells it to the gateways."""

    name: str
    aliases: tuple[str, ...] = ()
    version: str = "v1"
    revision: str = ""
    state: ModelState = ModelState.DECLARED
    state_reason: str = ""
    bundle_digest: str = ""
    weight_digests: tuple[str, ...] = ()
    max_model_len: int = 0
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    cold_start_s: float = 0.0
    replicas: int = 0
    replicas_desired: int = 0
    family: str = ""
    license: str = ""
    engine_class: str = ""
    weights_pinned: bool = False
    """Only workers with one of `weight_digests` may serve it; else they are what its workers have told."""
    fallback: tuple[str, ...] = ()
    """Models that take its calls while it has no worker that is ready."""
    versions: tuple[VersionShare, ...] = ()
    """Those that may get calls, the one that stays first; empty: whatever its workers are."""
    retired: tuple[str, ...] = ()
    """Generations (digests of what replicas are started with) whose workers get no new call."""
    card: Mapping[str, str] = field(default_factory=dict)
    """What the model card says of itself: a few short texts."""
    slo_ttft_s: float = 0.0
    """The model's objectives, by which calls are judged; 0 asks nothing."""
    slo_itl_s: float = 0.0
    starting_since_s: float = 0.0
    """Since the epoch: when the start under way began that is to give it its first replica; 0: none is."""
