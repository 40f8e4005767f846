"""The properties of a started engine, derived from vLLM's configuration and from the features of the installed vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.api.adapters import ADAPTERS
from cluster.api.pooling import pooling_capabilities
from cluster.api.types import RESUME_EXACT, RESUME_PLAIN, RESUME_STATE, EngineInfo, ModelSpec
from cluster.worker.engine.vllm import arguments, kv_events, pooling, repairs, resume
from cluster.worker.engine.vllm.adapters import EngineAdapters
from cluster.worker.engine.vllm.paths import EnginePath
from cluster.worker.engine.vllm.requests import RequestBounds


@dataclass(frozen=True, slots=True)
class EngineProperties:
    """The properties of a started engine: the EngineInfo for gateways, the bounds of requests, and the adapters."""

    info: EngineInfo
    bounds: RequestBounds
    adapters: EngineAdapters = field(default_factory=EngineAdapters)


def engine_properties(
    spec: ModelSpec, config: Any, path: EnginePath, *, why_public: str, exact_resume: bool, has_event_socket: bool
) -> EngineProperties:
    """Return the properties of a started engine. Raises ValueError for a pooling model that cannot be served.

    `config`: vLLM's VllmConfig. `why_public`: why the engine does not use the fast path; "" if it does.
    `exact_resume`: whether the tokens that were emitted before a resume are installed as output, not as prompt.
    `has_event_socket`: whether this process has a socket for the engine's KV events.
    """
    bounds = pooling.pooling_bounds(config, path.tasks, spec.name)
    has_events = has_event_socket and config.cache_config.enable_prefix_caching
    capabilities = kv_events.capabilities(config) if has_events else ()
    if bounds is not None:
        return _pooling(spec, config, bounds, why_public, capabilities)
    return _generating(spec, config, path, why_public, exact_resume, capabilities)


def _generating(
    spec: ModelSpec,
    config: Any,
    path: EnginePath,
    why_public: str,
    exact_resume: bool,
    kv_capabilities: tuple[str, ...],
) -> EngineProperties:
    model = config.model_config
    dtype = _dtype(config)
    installs = exact_resume and not repairs.why_resume_is_plain(config)
    adapters = EngineAdapters()
    if (lora := config.lora_config) is not None:
        adapters = EngineAdapters(lora.max_loras, lora.max_cpu_loras, config.parallel_config.world_size)
    bounds = RequestBounds(
        max_model_len=model.max_model_len,
        vocab_size=model.get_vocab_size(),
        max_logprobs=model.max_logprobs if model.max_logprobs >= 0 else model.get_vocab_size(),
        seeds=not arguments.on_cpu() or repairs.seeds_are_safe(),
        eos_token_ids=_eos_token_ids(config, path),
        installs=installs,
        resumes_seeds=resume.resumes_seeds(config, installs),
        budgets=bool(getattr(getattr(config, "reasoning_config", None), "enabled", False)),
        resumes_budgets=installs and resume.resumes_budgets(config),
        adapters=adapters,
    )
    info = EngineInfo(
        **_sizes(config, why_public),
        engine_class=arguments.engine_class(
            dtype, model.quantization, spec, resume.noise(config), length=arguments.length_class(model)
        ),
        kv_blocks=kv_blocks_of(config),
        vocab_size=bounds.vocab_size,
        default_sampling=arguments.sampling_defaults(model),
        capabilities=(
            *("chat", "complete", "logprobs", "response_format"),
            _resume_capability(installs, arguments.is_batch_invariant(dtype)),
            *kv_capabilities,
            *((ADAPTERS,) if adapters.slots else ()),
        ),
        adapter_slots=adapters.slots,
        adapter_capacity=adapters.capacity,
    )
    return EngineProperties(info, bounds, adapters)


def _pooling(
    spec: ModelSpec, config: Any, bounds: pooling.PoolingBounds, why_public: str, kv_capabilities: tuple[str, ...]
) -> EngineProperties:
    """Return the properties of an engine with a pooling model.

    Such an engine resumes no requests and has no sampling defaults.
    """
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    pooling.check_settings(spec, model, bounds)
    longest = pooling.longest_input(model)
    request_bounds = RequestBounds(longest, model.get_vocab_size(), max_logprobs=0, pooling=bounds)
    blocks = pooling.kv_blocks(
        cache.num_gpu_blocks or 0, block_size_of(config), scheduler.max_num_batched_tokens, model.max_model_len
    )
    info = EngineInfo(
        **(_sizes(config, why_public) | {"max_model_len": longest}),
        engine_class=arguments.engine_class(
            _dtype(config), model.quantization, spec, length=arguments.length_class(model)
        ),
        kv_blocks=blocks,
        vocab_size=request_bounds.vocab_size,
        capabilities=(*pooling_capabilities(bounds.info.tasks), *kv_capabilities),
        pooling=bounds.info,
    )
    return EngineProperties(info, request_bounds)


def _sizes(config: Any, why_public: str) -> dict[str, Any]:
    """Return the engine's path, version and sizes, as arguments of EngineInfo. They do not depend on the kind of model.
    `why_public`: why the engine does not use the fast path; "" if it does."""
    from vllm import __version__ as version

    return {
        "engine_path": "public" if why_public else "fastpath",
        "engine_path_reason": why_public,
        "engine_version": f"vllm {version}",
        "block_size": block_size_of(config),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_model_len": config.model_config.max_model_len,
    }


def block_size_of(config: Any) -> int:
    """Return the number of tokens of a KV block over all ranks. `config`: vLLM's VllmConfig.

    With decode context parallelism, the ranks divide the tokens of a block among themselves, and vLLM's setting is the
    part of one rank.
    """
    size: int = config.cache_config.block_size * config.parallel_config.decode_context_parallel_size
    return size


def kv_blocks_of(config: Any) -> int:
    """Return how many KV blocks sequences can fill. `config`: vLLM's VllmConfig.

    In a hybrid model, several groups of layers take their blocks from one pool, so that a sequence needs several blocks
    for the same tokens. vLLM's own number of tokens takes this into account, for sequences of the greatest length.
    """
    cache = config.cache_config
    blocks: int = cache.num_gpu_blocks or 0
    tokens: int | None = getattr(cache, "kv_cache_size_tokens", None)
    return blocks if tokens is None else min(blocks, tokens // block_size_of(config))


def _dtype(config: Any) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def _eos_token_ids(config: Any, path: EnginePath) -> frozenset[int]:
    """Return the EOS ids that vLLM uses: those of the generation config, and the tokenizer's EOS id."""
    configured = (config.model_config.try_get_generation_config() or {}).get("eos_token_id")
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    own = path.eos_token_id()
    return frozenset(ids if own is None else ids | {own})


def _resume_capability(installs: bool, batch_invariant: bool) -> str:
    if not installs:
        return RESUME_PLAIN
    return RESUME_EXACT if batch_invariant else RESUME_STATE
