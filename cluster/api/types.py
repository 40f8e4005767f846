"""Types shared by the packages. Token ids are ints in [0, vocab_size); times are seconds of a monotonic clock."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cluster.api.adapters import AdapterSpec
from cluster.api.frozen import frozen_dataclass
from cluster.api.output_parts import OutputParsing, ParsedOutput
from cluster.api.pooling import PoolingInfo, PoolingOptions, PoolingTask
from cluster.api.request_times import RequestTimes

MAX_INT32: Final = 2**31 - 1
"""Largest number that an int32 field of a message can hold: for example the length of a model's context."""


class FinishReason(enum.IntEnum):
    """Reason why the engine ended a request. The numbers are those of link.v1 Finish.Reason."""

    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4
    REPETITION = 5


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output of a request. `kind` is json_schema, json_object, regex, choice or grammar.

    `value` is the text of the schema, expression or grammar. For choice, `value` holds the allowed strings; for
    json_object, `value` is "". A sixth kind, structural_tag, is set only by a worker's output parser.
    """

    kind: str
    value: str | tuple[str, ...]
    field: str = "response_format"
    """Field of the caller's request that contains the constraint. Error messages name this field."""
    reasoning_ended: bool | None = None
    """Whether the constraint holds from the first token (True) or after the reasoning (False). None: the engine
    decides. Set by a worker's output parser."""
    template_kwargs: str = ""
    """Arguments of the chat template as a JSON object, which the engine's reasoning parser reads; "" for none."""


@frozen_dataclass
class Sampling:
    """Sampling parameters for the engine, with the model's defaults applied. The gateway handles stop strings.

    `logprobs`: None for no log probabilities, 0 for the sampled token only, k to add the k most likely tokens. `top_k`:
    0 for no limit. `stop_token_ids`: the caller's stop tokens. If `ignore_eos` is False, the engine also stops at the
    EOS ids of the generation config.
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
    max_reasoning_tokens: int | None = None
    """Budget for reasoning tokens, after which the engine ends the reasoning; None for no budget."""

    @property
    def is_seeded(self) -> bool:
        """Whether tokens are sampled with the caller's seed. Greedy decoding ignores the seed."""
        return self.seed is not None and self.temperature > 0


POOLING_SAMPLING: Final = Sampling(max_tokens=1, temperature=0.0)
"""Sampling parameters of all pooling requests. Pooling workers do not read these parameters. They limit a worker of an
older release, which does not know pooling, to one generated token."""


@frozen_dataclass
class EngineRequest:
    """Request to the engine for one sequence. `emitted_token_ids`: output tokens that a resumed sequence emitted before
    it was resumed.

    `request_id` must be unique during the life of the engine. The engine refuses a duplicate id.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: Sampling
    emitted_token_ids: Sequence[int] = ()
    cache_salt: str = ""
    priority: int = 0
    adapter: str = ""
    """Digest of the adapter; "" for the base model."""
    traceparent: str = ""
    """Trace context of this attempt if the call is sampled, else the caller's trace context without the flag
    `sampled`."""
    parsing: OutputParsing | None = None
    pooling: PoolingOptions | None = None
    """Set for a pooling request, which ignores `sampling` and ends with its first output."""
    tenant: str = ""
    """At a worker: the tenant's handle. "" if the gateway sends none."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log probabilities at one output position: the sampled token first, then the most likely tokens in order."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]


SLOW_GRAMMAR = (
    "the engine needs too long to check each token against this format; nest fewer loops and optional parts, and let "
    "alternatives begin differently"
)
"""Message of an output that ends with ERROR because its grammar slows the engine's steps."""


@dataclass(slots=True)
class TokenOutput:
    """Output of one engine step for one request. Not frozen: an instance is created for each token, and creating a
    frozen instance takes longer."""

    request_id: str
    token_ids: Sequence[int]
    finish: FinishReason | None = None
    stop_token_id: int | None = None
    """The id in Sampling.stop_token_ids that ended the request; None if EOS or the length limit ended the request."""
    prompt_tokens: int | None = None
    """Number of prompt tokens; set on the first output only."""
    cached_tokens: int | None = None
    """Number of prompt tokens that were read from the prefix cache; set on the first output only."""
    origin_lost: bool = False
    """Meaningful only on the first output of a resumed call.

    True: the worker considers the call's earlier gateway lost, or has run the call's detached request until the resume.
    """
    logprobs: Sequence[PositionLogprobs] | None = None
    message: str = ""
    """Cause of an error for the logs; set with `finish` ERROR."""
    parsed: ParsedOutput | None = None
    """Parts of the output, if the worker parses it."""
    times: RequestTimes | None = None
    """Times of the request, if its call is sampled; set on the first and on the last output only."""
    vector: bytes | None = None
    """Result of a pooling request: little-endian float32 values. Comes with `finish` STOP and without tokens."""


RESUME_EXACT = "resume:exact"
"""Capability: a resumed call generates exactly the tokens of an uninterrupted call. Emitted tokens count as output,
every parameter continues unchanged, and the arithmetic does not depend on batching."""

RESUME_STATE = "resume:state"
"""Capability: like RESUME_EXACT, except that the arithmetic depends on batching. Sampler state and sampling noise
continue unchanged, but tokens may differ where two tokens are almost equally likely."""

RESUME_PLAIN = "resume:plain"
"""Capability: emitted tokens are appended to the prompt. Calls with a frequency or presence penalty, a seed or a
grammar are refused."""

TOOL_PARSER, REASONING_PARSER = "tools:", "reasoning:"
"""Prefixes of the capabilities that name a worker's parsers of tool calls and of reasoning, e.g. `tools:hermes`."""
RENDERER = "renders:"
"""Prefix of the capability that names a worker's renderer of chats, e.g. `renders:deepseek_v32`."""

PARSER_KINDS = (TOOL_PARSER, REASONING_PARSER)

KV_EVENTS = "kv_events:v1"
"""Capability: the worker reports the KV blocks that it holds. Prefix hashes (policy/kv_cache) identify the blocks."""

PREFIX_EXACT = "prefix:exact"
"""Capability: the engine finds exactly the reported KV blocks in its cache, since all layers have full attention. An
engine without this capability may find fewer blocks, so the number of cached tokens can only be estimated."""

RESUME_CAPABILITIES = (RESUME_PLAIN, RESUME_STATE, RESUME_EXACT)
"""Resume capabilities from the weakest to the strongest. Each engine has one of these capabilities."""


def weakest_resume_capability(capabilities: Iterable[str]) -> str:
    """Return the weakest of the resume capabilities in `capabilities`, "" if there is none. `capabilities` may also
    hold capabilities of other kinds."""
    present = set(capabilities)
    return next((word for word in RESUME_CAPABILITIES if word in present), "")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Properties of an engine, which do not change after the engine's start."""

    engine_class: str
    """dtype, quantization and parallelism in one string, e.g. `float32-tp2-pp1`. Engines of equal classes compute
    equally."""
    engine_path: str
    """Code that runs a step: `fastpath`, `public` (vLLM's public API; `engine_path_reason` says why) or `sim`."""
    engine_version: str
    block_size: int
    kv_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    """Sampling fields of the generation config that differ from vLLM's defaults. The keys are vLLM's names."""
    engine_path_reason: str = ""
    capabilities: tuple[str, ...] = ()
    pooling: PoolingInfo | None = None
    """Set for a pooling model, which serves no generation."""
    adapter_slots: int = 0
    """Maximum number of different adapters in one step; 0 if the engine takes no adapters. `adapter_capacity`: maximum
    number of adapters in the engine's memory."""
    adapter_capacity: int = 0

    @property
    def kv_tokens(self) -> int:
        """Number of tokens that fit into the KV cache."""
        return self.block_size * self.kv_blocks


@frozen_dataclass
class EngineLoad:
    """Current load of an engine. `steps` never decreases; `kv_usage` is in [0, 1]; `step_s`: seconds of the last step.

    `busy` names work that explains a long current step: `start`, `prefill`, `grammar`, `adapter`, or `cpu` (the engine
    gets no CPU core). `busy` is "" once the step has lasted longer than such work can take. An engine with requests
    counts as hanging if `busy` is "", `steps` does not grow and `step_age_s` is far above `step_p99_s`.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    step_s: float = 0.0
    busy: str = ""
    step_age_s: float = 0.0
    """Seconds since the current step began; 0 when the engine is idle."""
    step_p99_s: float = 0.0
    """99th percentile of the step time, in seconds, over the last few thousand steps; 0 before the first step."""
    prefill_tokens: int = 0
    """Number of prompt tokens of requests that have no output yet, including requests in the engine's queue."""


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Identity of a worker. EngineInfo describes the worker's engine."""

    worker_id: str
    incarnation: str
    model: str
    version: str = ""
    weight_digest: str = ""
    bundle_digest: str = ""
    ray_cluster: str = "local"
    node: str = ""
    generation: str = ""
    """Digest of the settings with which the worker's replica was started; empty if unknown."""
    pod: str = ""
    """Name of the worker's pod; empty outside Kubernetes."""
    host: str = ""
    """Kubernetes node name of the pod, or the host name outside Kubernetes; `node` is Ray's node id."""
    gpu: str = ""
    """Accelerator type; empty without an accelerator."""


_NOISE = re.compile(r"(-pp\d+)-[a-z0-9]+$")


def without_seed_noise(engine_class: str) -> str:
    """Return an engine class without the suffix that names the engine's sampling noise, if it has this suffix.

    The sampling noise is the random numbers that a seed gives. worker/engine/vllm/resume.py appends the suffix after
    the parallelism, as in `-pp1-<noise>`.
    """
    return _NOISE.sub(r"\1", engine_class)


@dataclass(frozen=True, slots=True)
class CompatibilityKey:
    """Properties that two workers must share so that one worker can resume a sequence that the other began.

    The properties are the weights, the tokenizer and the engine's arithmetic (dtype, quantization, parallelism). For a
    call with a seed, the seed must also give the same random numbers on both workers (sampling noise).
    """

    weight_digest: str
    bundle_digest: str
    engine_class: str

    @property
    def unseeded(self) -> CompatibilityKey:
        """The key to compare for a call without a seed: this key without the sampling noise, which matters only for
        calls with a seed."""
        return CompatibilityKey(self.weight_digest, self.bundle_digest, without_seed_noise(self.engine_class))

    def can_resume(self, begun: CompatibilityKey) -> bool:
        """Return whether a worker with this key may resume a call. `begun`: key of the worker that began the call, or
        its `unseeded` key for a call without a seed."""
        return begun in (self, self.unseeded)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model's configuration entry in the form that controller, replicas and engine use. Can be stored as JSON.

    `engine`: engine arguments by vLLM's names, without the arguments that Headrace sets itself. `gpu`: Ray's
    accelerator type, empty for any type. `idle_s`: with `min_replicas` 0, the last replica ends after this number of
    seconds without a call.
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
    control_tokens_in_content: str = "keep"
    """Whether the texts of control tokens in contents become control tokens (`keep`) or are escaped (`escape`)."""
    digest: str = ""
    """Weight digest that every worker of the model must have; empty for any digest."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """Sampling defaults of the entry, by the names of the request's fields."""
    license: str = ""
    """License of the weights according to the entry, as a lower-case SPDX name; empty: the license in the model's
    folder."""
    ray: str = ""
    """Name of the Ray cluster on which the model runs; empty for the first Ray cluster."""
    fallback: tuple[str, ...] = ()
    """Models that serve this model's calls while this model has no ready worker. The first model with a ready worker is
    used."""
    weight: float = 1.0
    """Share of the model's calls that this version gets, in [0, 1]; the shares of all versions add up to 1."""
    error_ratio: float = 0.0
    """For a canary: roll it back when its error rate exceeds the stable version's error rate times this factor; 0:
    never."""
    ttft_ratio: float = 0.0
    """For a canary: roll it back when its time to first token exceeds the stable version's time to first token times
    this factor; 0: never."""
    slo_ttft_s: float = 2.0
    """SLO for the time to first token, in seconds. `slo_itl_s` is the SLO for the mean time between tokens.
    `slo_target` is the share of calls that must meet both SLOs."""
    slo_itl_s: float = 0.1
    slo_target: float = 0.99

    @property
    def replicas(self) -> int:
        """Initial number of replicas: at least one, since the first replica reports the model's properties."""
        return max(self.min_replicas, 1)


class DrainState(enum.StrEnum):
    """State of a worker, which determines whether the worker accepts new sequences. The names are those of link.v1
    Standing.State."""

    SERVING = "SERVING"
    CORDONED = "CORDONED"
    DRAINING = "DRAINING"
    DRAINED = "DRAINED"


class ModelState(enum.StrEnum):
    """State in a model's lifecycle. The names are those of inference.proto's Model.State without the prefix."""

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
    """A version of a model, as published to the gateways.

    `weight` is the version's share of the model's calls, in [0, 1].
    """

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
    """True: the version gets no new calls, and its running calls are resumed on other versions where possible."""
    ttft_ratio: float = 0.0
    """For a canary: gateways count each call with a time to first token above `ttft_ratio` times that of a call to the
    stable version."""


@dataclass(frozen=True, slots=True)
class VersionTally:
    """A gateway's counts for one version of a model, since the gateway's start.

    `errors`: calls that failed because of the worker. `pairs`: calls whose time to first token was compared with that
    of the stable version's latest call. `slower`: the calls among `pairs` that took more than `ttft_ratio` times as
    long as the stable version's call.
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
    """A model in the form that the controller publishes to the gateways."""

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
    """Sampling defaults of the model's generation config. The values of `sampling`, from its entry, precede them."""
    sampling: Mapping[str, object] = field(default_factory=dict)
    cold_start_s: float = 0.0
    replicas: int = 0
    replicas_desired: int = 0
    family: str = ""
    license: str = ""
    engine_class: str = ""
    weights_pinned: bool = False
    """True: only workers with one of `weight_digests` may serve the model. False: `weight_digests` are the digests that
    the model's workers report."""
    fallback: tuple[str, ...] = ()
    """Models that serve this model's calls while this model has no ready worker."""
    versions: tuple[VersionShare, ...] = ()
    """Versions that may get calls, the stable version first. Empty: every version of the model's workers may get
    calls."""
    retired: tuple[str, ...] = ()
    """Generations (digests of replica settings) whose workers get no new calls."""
    card: Mapping[str, str] = field(default_factory=dict)
    """Short texts of the model card, by field."""
    slo_ttft_s: float = 0.0
    """SLO for the time to first token, in seconds; 0: no SLO. `slo_itl_s` is the SLO for the time between tokens."""
    slo_itl_s: float = 0.0
    slo_target: float = 0.0
    """Share of the calls that should meet both SLOs; 0 if there is no SLO or the controller is of an older release."""
    starting_since_s: float = 0.0
    """Time at which the model's first replica began to start, in seconds since the epoch; 0 while no first replica is
    starting."""
    tasks: tuple[PoolingTask, ...] = ()
    """Pooling tasks of the model's workers. Empty if the model generates, or if no worker has reported yet. Before the
    first report, `engine_class` is empty too."""
    adapters: tuple[AdapterSpec, ...] = ()
    """Adapters that the model's workers load, in all versions."""
