"""Conversion of a catalog entry to vLLM's engine arguments, and the environment of vLLM's processes."""

from __future__ import annotations

import dataclasses
import difflib
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


def engine_class(dtype: str, quantization: str | None, spec: ModelSpec, noise: str = "") -> str:
    """Return the engine class: a name that two engines share if they compute in the same way.

    Examples are `float32-tp2-pp1` and `bfloat16-fp8-tp8-pp1-v2`. The parts of the name are dtype, quantization, ranks
    and noise scheme (resume.noise). The scheme CPU_32 is omitted, so that names from older releases, which had no noise
    scheme, stay valid.
    """
    quantized = f"-{quantization}" if quantization else ""
    drawn = "" if noise in ("", resume.CPU_32) else f"-{noise}"
    return f"{dtype}{quantized}-tp{spec.tensor_parallel_size}-pp{spec.pipeline_parallel_size}{drawn}"


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
