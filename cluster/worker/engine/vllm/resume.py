"""Exact continuation: the tokens that another engine has emitted are installed as *output*, as after a preemption.

Problem: prompt + emitted ids as a new prompt restarts all that counts or replays output: frequency and presence
penalties, min_tokens, a seeded generator, the matcher of a grammar. vLLM itself takes a request that it had preempted
with its output in place, and computes prompt and output anew as one prefill. Invariant: a request with emitted ids is
to scheduler, runner, sampler and matcher what it would be had this engine emitted them and then preempted it.

The ids travel in SamplingParams.extra_args, which reach the engine core and every rank. In the core they go into the
Request (and so into its block hashes: the prefix cache serves them) and through the matcher of its grammar, token by
token as they had come. The V2 model runner needs no more: the scheduler sends it prompt and output apart, it makes all
state from them as it does for a preempted request, and its noise is a function of seed, position and token. In a rank
of the V1 runner they go into the cached state, and a seeded generator makes one draw for each; that is known of the CPU
build alone. The price is private names: they stand in the tables below. Where one is missing, or the engine is of a
kind that was not looked at (why_plain), a call is continued as a new prompt, and refused when that would change it
(requests.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from cluster.worker.engine.vllm.private_names import digest, missing

EXTRA_ARG = "headrace_emitted"

CORE_SYMBOLS: dict[str, tuple[str, ...]] = {
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
    "vllm.v1.structured_output.StructuredOutputManager.accept_tokens": ("request", "new_token_ids"),
    "vllm.v1.structured_output.request.StructuredOutputRequest": ("reasoning_ended",),
}
V1_SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_input_batch.CachedRequestState": ("sampling_params", "generator", "output_token_ids"),
    "vllm.v1.worker.gpu_input_batch.CachedRequestState.__post_init__": (),
    "vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu": ("logits", "generators", "k", "p"),
}
"""Of ranks of the V1 model runner."""
V2_SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.output.NewRequestData.from_request": ("prefill_token_ids",),
    "vllm.v1.worker.gpu.states.RequestState.add_request": ("prompt_len", "all_token_ids"),
}
"""Of ranks of the V2 model runner."""
SYMBOLS = CORE_SYMBOLS | V1_SYMBOLS | V2_SYMBOLS


def why_plain(config: Any) -> str:
    """Why an engine of this VllmConfig cannot continue exactly; empty when it can. Its processes must load the
    plugin, too (repairs.loaded_in_ranks)."""
    from vllm.platforms import current_platform

    v2 = config.use_v2_model_runner
    reasons = (
        (not v2 and not current_platform.is_cpu(), "of the V1 model runner only the CPU build's sampler is known"),
        (not v2 and config.parallel_config.pipeline_parallel_size > 1, "pipeline parallelism on the V1 model runner"),
        (not v2 and config.model_config.use_fp64_gumbel, "use_fp64_gumbel draws differently on the V1 model runner"),
        (not v2 and config.speculative_config is not None, "speculative decoding on the V1 model runner"),
        (config.kv_transfer_config is not None, "a KV connector"),
        (bool(config.model_config.logits_processors), "custom logits processors"),
        (getattr(config, "watermark_config", None) is not None, "watermarking"),
    )
    for holds, reason in reasons:
        if holds:
            return reason
    lacking = missing(CORE_SYMBOLS | (V2_SYMBOLS if v2 else V1_SYMBOLS))
    return f"this vLLM lacks {', '.join(lacking)}" if lacking else ""


def resumes_seeds(config: Any, installed: bool) -> bool:
    """Whether a seeded random call goes on with the noise that it would have had. `installed`: its emitted tokens are
    output here. With a draft model it does not: windows start elsewhere, and what is drawn depends on what was
    proposed. The V2 runner's noise needs nothing installed. Of the V1 runner the draws of 0.31 are not known."""
    if config.speculative_config is not None:
        return False
    return bool(config.use_v2_model_runner) or (installed and noise(config) == CPU_32)


V1, V2, CPU_31, CPU_32 = "v1", "v2", "cpu31", "cpu32"
"""Schemes of noise: what a seed draws. See `noise`."""
DRAWS = {"863f32f93b242303": CPU_31, "6d05adf47d121861": CPU_32}
"""What the V1 runner draws on CPUs, by the digest of TopKTopPSampler.forward_cpu: its names stayed as it changed."""


def noise(config: Any) -> str:
    """How seeded calls are drawn on such an engine: with one seed, two schemes give different tokens.

    V2: murmur3 of seed, position and token, the same in 0.31 to 0.33. The V1 runner's on CPUs: 0.31 draws exponentials
    over the vocabulary, 0.32 one number a token, and a sampler that is not known is a scheme of its own. PeerBacklogs
    V1 draws by the device's own generator.
    """
    from vllm.platforms import current_platform

    if config.use_v2_model_runner:
        return V2
    if not current_platform.is_cpu():
        return V1
    try:
        found = digest("vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu")
    except (ImportError, AttributeError, OSError):
        found = "unknown"
    return DRAWS.get(found, f"cpu{found}")


def extra_args(emitted_token_ids: Sequence[int]) -> dict[str, Any]:
    """What SamplingParams carry."""
    return {EXTRA_ARG: list(emitted_token_ids)}


def emitted_of(params: Any) -> list[int]:
    """The emitted ids of SamplingParams or None."""
    extra = params.extra_args if params is not None else None
    return extra.get(EXTRA_ARG) or [] if extra else []


def install(*, v1_ranks: bool) -> None:
    """Change vLLM's classes in this process: an engine core or a rank. Once. `v1_ranks`: of the V1 runner, too, which
    changes nothing for the V2 runner."""
    _install_in_core()
    _install_in_grammars()
    if v1_ranks:
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
        emitted = emitted_of(request.sampling_params)
        if emitted:
            _replay(self, request, grammar, emitted)
        return grammar

    StructuredOutputManager._create_grammar = _create_grammar


def _replay(manager: Any, request: Any, grammar: Any, emitted: Sequence[int]) -> None:
    """Put the emitted tokens through a grammar's matcher as they had come, each with those before it, since a grammar
    may begin behind reasoning. Raises ValueError, which ends this request alone.

    It runs in a thread, while the request itself waits for the grammar: so a view of it is used, and its own record
    learns at the end whether reasoning is over.
    """
    own = request.structured_output_request
    record = copy.copy(own)
    record.grammar = grammar
    seen = list(request.prompt_token_ids or ())
    view = SimpleNamespace(
        request_id=request.request_id,
        use_structured_output=True,
        structured_output_request=record,
        prompt_token_ids=request.prompt_token_ids,
        all_token_ids=seen,
    )
    for token in emitted:
        seen.append(token)
        if not manager.accept_tokens(view, [token]):
            raise ValueError("the emitted tokens do not follow the grammar")
    own.reasoning_ended = record.reasoning_ended


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
