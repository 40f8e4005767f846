"""Conversion of a catalog entry to vLLM's engine arguments, and the environment of vLLM's processes."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.api.types import ModelSpec
from cluster.config.engine import PARSER_KEYS
from cluster.wire.bundle import MAX_TOKENS_LIMIT
from cluster.worker.engine.vllm import repairs, resume
from cluster.worker.rendering.families import MISTRAL
from cluster.worker.weights.sentence_modules import config_overrides
from cluster.worker.weights.tekken import TEKKEN_FILE

CPU_KV_CACHE_BYTES = 1 << 30
"""Size of the KV cache in bytes on machines without GPUs, unless `engine.kv_cache_memory_bytes` is set."""

EXECUTORS = ("ray", "mp")

GRAMMAR_BACKEND = "xgrammar"
"""The backend of structured outputs, unless the entry names one. With vLLM's default, `auto`, an engine compiles all
grammars with the backend that its first request chose: one caller would decide how another's schema is enforced."""
TEKKEN_GRAMMAR_BACKEND = "guidance"
"""The backend for models with Mistral's own tokenizer. Their parser of tool calls writes grammars with the names of
special tokens, and xgrammar does not know these tokens."""


def on_cpu() -> bool:
    """Return whether vLLM uses its CPU platform in this process."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def engine_arguments(
    spec: ModelSpec,
    folder: Path,
    executor: str,
    reasoning_parser: str = "",
    tokenizer_mode: str = "",
    kv_events: Any = None,
) -> Any:
    """Return vLLM's AsyncEngineArgs for a catalog entry.

    `executor`: how several ranks are placed, on a Ray placement group ("ray") or as processes on this host ("mp").
    `reasoning_parser`: name of vLLM's parser of the model's reasoning, "" for none. `tokenizer_mode`: vLLM's mode for
    the tokenizer, used if the entry sets none; "" for vLLM's own choice. `kv_events`: vLLM's KVEventsConfig; None for
    no events. Raises ValueError for invalid arguments; for an unknown argument the error names `engine.<name>`.
    """
    from vllm import AsyncEngineArgs

    if executor not in EXECUTORS:
        raise ValueError(f"executor {executor!r} is unknown: use one of {', '.join(EXECUTORS)}")
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    for name in spec.engine:
        if name not in known and name not in PARSER_KEYS:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean `engine.{near[0]}`?" if near else ""
            raise ValueError(f"engine.{name}: vLLM has no such engine argument{hint}")
    chosen: dict[str, Any] = {
        "model": str(folder),
        "served_model_name": [spec.name],
        "dtype": spec.dtype,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "max_model_len": spec.max_model_len,
        "trust_remote_code": spec.trust_remote_code,
        "load_format": spec.load_format,
        "scheduling_policy": "priority",
        "disable_log_stats": False,
        **({} if kv_events is None else {"kv_events_config": kv_events}),
        **({"tokenizer_mode": tokenizer_mode} if tokenizer_mode else {}),
        **_platform_defaults(spec),
        **{name: value for name, value in spec.engine.items() if name != "structured_outputs_config"},
    }
    own = spec.engine.get("hf_overrides")
    if (overrides := config_overrides(folder)) and isinstance(own, Mapping | None):
        chosen["hf_overrides"] = {**overrides, **(own or {})}
    if world_size(spec) > 1:
        chosen["distributed_executor_backend"] = executor
    if why := _why_not_on_cpu(spec) if on_cpu() else "":
        raise ValueError(f"models[{spec.name}].engine.{why}")
    chosen = {name: value for name, value in chosen.items() if name not in PARSER_KEYS}
    is_tekken = chosen.get("tokenizer_mode") == MISTRAL and (folder / TEKKEN_FILE).exists()
    backend = TEKKEN_GRAMMAR_BACKEND if is_tekken else GRAMMAR_BACKEND
    try:
        return AsyncEngineArgs(
            **chosen, structured_outputs_config=_grammars(spec, backend), reasoning_parser=reasoning_parser
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"models[{spec.name}].engine: {error}") from error


def _why_not_on_cpu(spec: ModelSpec) -> str:
    """Return why vLLM's CPU kernels cannot run the catalog entry; empty if no reason is known."""
    ranks = spec.tensor_parallel_size * int(spec.engine.get("data_parallel_size") or 1)  # type: ignore[call-overload]
    if spec.engine.get("enable_expert_parallel") and ranks > 1:
        return (
            f"enable_expert_parallel: vLLM's CPU kernels crash with experts on {ranks} ranks; leave it out (the ranks "
            "then share each expert), or set tensor_parallel_size to 1"
        )
    return ""


def why_no_prefix_caching(config: Any) -> str:
    """Return why an engine with this VllmConfig cannot cache prefixes; empty if no reason is known.

    With prefix caching, vLLM's CPU kernels return the state of a sequence where their caller expects the states at the
    ends of its chunks (ops/cpu/mamba_ssm.py), which ends the engine at the first prompt longer than a block.
    """
    if on_cpu() and (config.model_config.is_hybrid or config.model_config.is_attention_free):
        return "vLLM's CPU kernels cannot cache the states of a model with Mamba or convolution layers"
    return ""


def _grammars(spec: ModelSpec, backend: str) -> Any:
    """Return vLLM's configuration of structured outputs.

    `backend`: the grammar backend to use if the catalog entry names none. Raises TypeError or ValueError for a wrong
    configuration.
    """
    from vllm.config import StructuredOutputsConfig

    chosen = spec.engine.get("structured_outputs_config") or {}
    if not isinstance(chosen, Mapping):
        raise TypeError("structured_outputs_config: must be a mapping")
    return StructuredOutputsConfig(**{"backend": backend, **chosen})


def world_size(spec: ModelSpec) -> int:
    """Return the number of ranks of one replica."""
    return spec.tensor_parallel_size * spec.pipeline_parallel_size


def _platform_defaults(spec: ModelSpec) -> dict[str, Any]:
    if not on_cpu():
        return {}
    defaults: dict[str, Any] = {"enforce_eager": True}
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return defaults


def prepare_environment(spec: ModelSpec, executor: str) -> None:
    """Set the environment variables for vLLM's child processes. Variables that are already set keep their values, with
    few exceptions.

    Children are spawned, not forked: a fork would copy the links' sockets and thread locks into the engine core.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A trial bounds the CPU time (grammar/probe_process.py); vLLM's 5 s of wall time would refuse on a busy host.
    os.environ.setdefault("VLLM_REGEX_COMPILATION_TIMEOUT_S", "60")
    # Without SPT_NOENV a new process title overwrites the environment, by which an instance's processes are found.
    os.environ.setdefault("SPT_NOENV", "1")
    os.environ[repairs.ACTIVE] = "1"
    _carry_to_ray_ranks("HEADRACE_")
    if world_size(spec) > 1 and executor == "ray":
        os.environ.setdefault("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1")
    if not on_cpu():
        # On a GPU the NaN count is copied with the tokens; on CPUs it would cost a tenth of a step with many streams.
        os.environ.setdefault("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
        return
    if "kv_cache_memory_bytes" in spec.engine or not os.environ.get("VLLM_CPU_KVCACHE_SPACE", "unset"):
        # If the variable is set, it would override kv_cache_memory_bytes; if it is empty, it ends the worker.
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if world_size(spec) > 1:
        # vLLM's automatic binding refuses several ranks on one NUMA node.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _carry_to_ray_ranks(prefix: str) -> None:
    """Make vLLM copy environment variables with this prefix to the ranks that Ray places, including ranks on other
    nodes."""
    prefixes = os.environ.get("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "")
    if prefix not in prefixes.split(","):
        os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] = ",".join(filter(None, (prefixes, prefix)))


SAME_ARITHMETIC = frozenset(
    """
    aggregate_engine_logging async_scheduling collect_detailed_traces cpu_offload_gb cudagraph_metrics
    custom_histogram_buckets distributed_timeout_seconds download_dir enable_chunked_prefill enable_log_requests
    enable_logging_iteration_details enable_lora enable_mfu_metrics enable_prefix_caching enable_sleep_mode
    gpu_memory_utilization ignore_patterns kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample
    kv_offloading_backend kv_offloading_size long_prefill_token_threshold max_cpu_loras max_logprobs max_lora_rank
    max_loras max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens max_num_seqs
    max_parallel_loading_workers num_gpu_blocks_override otlp_traces_endpoint override_generation_config
    prefix_cache_retention_interval prefix_caching_hash_algo pt_load_map_location quantization
    safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads seed shutdown_timeout
    stream_interval tokenizer_mode use_tqdm_on_load watermark
    """.split()  # noqa: SIM905 - a list of one name a line would be three times as long
) | frozenset(PARSER_KEYS)
"""Engine arguments that do not change what the model computes from given tokens: memory, batches, loading, metrics,
and those that are sent with each request or are a part of the engine class of their own. Every other argument counts as
arithmetic, so that one that a later vLLM adds does so until it is listed here."""


def engine_class(dtype: str, quantization: str | None, spec: ModelSpec, noise: str = "", *, length: str = "") -> str:
    """Return the engine class: a name that two engines share if they compute in the same way.

    Examples are `float32-tp2-pp1` and `bfloat16-fp8-4e1c9a07-tp8-pp1-v2`. The parts of the name are dtype,
    quantization, `length` (see length_class), a digest of the engine arguments that change the arithmetic, ranks and
    noise scheme (resume.noise). Parts at their default are omitted, also the scheme CPU_32, so that names from older
    releases stay valid.
    """
    drawn = "" if noise in ("", resume.CPU_32) else noise
    ranks = f"tp{spec.tensor_parallel_size}-pp{spec.pipeline_parallel_size}"
    return "-".join(filter(None, (dtype, quantization, length, _arithmetic_digest(spec), ranks, drawn)))


def _arithmetic_digest(spec: ModelSpec) -> str:
    from vllm import AsyncEngineArgs

    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(AsyncEngineArgs)
    } | _platform_defaults(spec)
    settings = {
        name: value
        for name, value in spec.engine.items()
        if name not in SAME_ARITHMETIC and not (name in defaults and value == defaults[name])
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8] if settings else ""


LLAMA_4_TUNED_TOKENS = 32_768


def length_class(model: Any) -> str:
    """Return "short" if vLLM computes otherwise because of a small `max_model_len`, otherwise "".

    LongRoPE takes its short factors for all prompts where max_model_len is at most the original length
    (phi3_long_rope_scaled_rope.py), and Llama 4 does not tune its attention's temperature up to 32,768 (llama4.py).
    `model`: vLLM's ModelConfig.
    """
    config = model.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
    is_short = rope.get("rope_type") == "longrope" and model.max_model_len <= (original or 0)
    is_untuned = config.model_type.startswith("llama4") and model.max_model_len <= LLAMA_4_TUNED_TOKENS
    return "short" if is_short or is_untuned else ""


def is_batch_invariant(dtype: str) -> bool:
    """Return whether results are independent of how tokens are batched.

    This holds for float32 on CPUs, and with VLLM_BATCH_INVARIANT=1.
    """
    return (dtype == "float32" and on_cpu()) or os.environ.get("VLLM_BATCH_INVARIANT") == "1"


def sampling_defaults(model: Any) -> dict[str, object]:
    """Return the sampling defaults of a model that are numbers. Only these are sent to the gateways.

    `model`: vLLM's ModelConfig. As in vLLM's server (entrypoints/openai/chat_completion/serving.py), the operator's
    own `max_new_tokens` also limits calls that ask for more.
    """
    values = dict(model.get_diff_sampling_param())
    if model.generation_config not in ("auto", "vllm"):
        values[MAX_TOKENS_LIMIT] = values.get("max_tokens")
    else:
        values[MAX_TOKENS_LIMIT] = model.override_generation_config.get("max_new_tokens")
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}
