"""Exact continuation: the tokens that another engine has emitted are installed as *output*, as after a preemption.

Problem: prompt + emitted ids as a new prompt restarts all that counts or replays output: frequency and presence
penalties, min_tokens, a seeded generator, the matcher of a grammar. vLLM itself takes a request that it had preempted
with its output in place, and computes prompt and output anew as one prefill. Invariant: a request with emitted ids is
to scheduler, runner, sampler and matcher what it would be had this engine emitted them and then preempted it.

The ids travel in SamplingParams.extra_args, which reach the engine core and every rank. In the core they go into the
Request (and so into its block hashes: the prefix cache serves them) and through the matcher of its grammar, token by
token as they had come. In a rank they go into the cached state, and a seeded generator makes one draw for each. The
price is private names: they stand in SYMBOLS. Where one is missing, or the engine is of a kind that was not looked at
(why_plain), a call is continued as a new prompt, and refused when that would change it (requests.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.engine.symbols import missing

EXTRA_ARG = "headrace_emitted"
VERSIONS = ("0.32.0",)

SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.SamplingParams": ("extra_args",),
    "vllm.v1.request.Request.from_engine_core_request": ("request", "block_hasher"),
    "vllm.v1.request.Request.append_output_token_ids": ("token_ids",),
    "vllm.v1.request.Request.num_tokens": (),
    "vllm.v1.request.Request.take_prefill_stats": (),
    "vllm.v1.core.kv_cache_manager.KVCacheManager.record_prefix_cache_stats": ("request", "num_hits"),
    "vllm.v1.metrics.stats.PrefillStats": ("num_prompt_tokens", "num_cached_tokens"),
    "vllm.v1.metrics.stats.PrefillStats.set": (
        "num_prompt_tokens",
        "num_local_cached_tokens",
        "num_external_cached_tokens",
    ),
    "vllm.v1.structured_output.StructuredOutputManager._create_grammar": ("request",),
    "vllm.v1.structured_output.backend_types.StructuredOutputGrammar.accept_tokens": ("request_id", "tokens"),
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": ("sampling_params", "generator", "output_token_ids"),
    "vllm.v1.worker.gpu_input_batch.CachedRequestState.__post_init__": (),
    "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu": ("logits", "generators", "k", "p"),
}


def why_plain(config: Any) -> str:
    """Why an engine of this VllmConfig cannot continue exactly; empty when it can. Its processes must load the
    plugin, too (repairs.loaded_in_ranks)."""
    from vllm.platforms import current_platform

    reasons = (
        (not current_platform.is_cpu(), "only the CPU build's sampler is known"),
        (config.use_v2_model_runner, "the V2 model runner keeps requests in another way"),
        (config.scheduler_config.async_scheduling, "asynchronous scheduling"),
        (config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism"),
        (config.speculative_config is not None, "speculative decoding"),
        (config.kv_transfer_config is not None, "a KV connector"),
        (config.structured_outputs_config.reasoning_parser, "a reasoning parser"),
        (config.model_config.use_fp64_gumbel, "use_fp64_gumbel draws differently"),
    )
    for holds, reason in reasons:
        if holds:
            return reason
    lacking = missing(SYMBOLS)
    return f"this vLLM lacks {', '.join(lacking)}" if lacking else ""


def extra_args(emitted_token_ids: Sequence[int]) -> dict[str, Any]:
    """What SamplingParams carry."""
    return {EXTRA_ARG: list(emitted_token_ids)}


def emitted_of(params: Any) -> list[int]:
    """The emitted ids of SamplingParams or None."""
    extra = params.extra_args if params is not None else None
    return extra.get(EXTRA_ARG) or [] if extra else []


def install() -> None:
    """Change vLLM's classes in this process: an engine core or a rank. Once."""
    _install_in_core()
    _install_in_grammars()
    _install_in_ranks()


def _install_in_core() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.request import Request

    class ContinuedStats(PrefillStats):  # type: ignore[misc]
        """Prefill statistics over prompt and emitted tokens. False, so that the scheduler does not fill it in: it would
        assert that no more than the prompt is cached."""

        def __bool__(self) -> bool:
            return False

    make, record = Request.from_engine_core_request.__func__, KVCacheManager.record_prefix_cache_stats

    def from_engine_core_request(cls: Any, request: Any, block_hasher: Any) -> Any:
        made = make(cls, request, block_hasher)
        if emitted := emitted_of(request.sampling_params):
            made.append_output_token_ids(emitted)
            made.prefill_stats = ContinuedStats()
        return made

    def record_prefix_cache_stats(self: Any, request: Any, num_hits: int) -> None:
        stats = request.prefill_stats
        if isinstance(stats, ContinuedStats) and not stats.num_prompt_tokens:  # at its first admission
            stats.set(request.num_tokens, num_hits, 0)
        record(self, request, num_hits)

    Request.from_engine_core_request = classmethod(from_engine_core_request)
    KVCacheManager.record_prefix_cache_stats = record_prefix_cache_stats


def _install_in_grammars() -> None:
    from vllm.v1.structured_output import StructuredOutputManager

    create = StructuredOutputManager._create_grammar

    def _create_grammar(self: Any, request: Any) -> Any:
        grammar = create(self, request)
        for token in emitted_of(request.sampling_params):
            if not grammar.accept_tokens(request.request_id, [token]):
                raise ValueError("the emitted tokens do not follow the grammar")  # ends this request alone
        return grammar

    StructuredOutputManager._create_grammar = _create_grammar


def _install_in_ranks() -> None:
    import torch
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    post_init = CachedRequestState.__post_init__

    def __post_init__(self: Any) -> None:
        post_init(self)
        emitted = emitted_of(self.sampling_params)
        if not emitted or self.output_token_ids:
            return
        self.output_token_ids = list(emitted)
        if self.generator is not None:
            for _ in emitted:  # as TopKTopPSampler.forward_cpu draws, once a token
                torch.randint(0, 2**31, (1,), generator=self.generator, dtype=torch.long)

    CachedRequestState.__post_init__ = __post_init__
