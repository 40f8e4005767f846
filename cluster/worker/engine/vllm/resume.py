"""Exact resume in vLLM: tokens that another engine has emitted are installed as *output*, as after a preemption.

Problem: if prompt and emitted ids were submitted as a new prompt, everything that depends on the output would restart:
frequency and presence penalties, min_tokens, a seeded generator, the matcher of a grammar. vLLM itself resumes a
preempted request with its output in place, and computes prompt and output again as one prefill. Invariant: scheduler,
runner, sampler and matcher treat a request with emitted ids as if this engine had emitted the ids and then preempted
the request.

The ids are sent in SamplingParams.extra_args, which reach the engine core and every rank. In the core, the ids are
added to the Request. So they are also part of the Request's block hashes, and the prefix cache is used. The matcher of
the request's grammar accepts the ids one by one.

The V2 model runner needs nothing more. The scheduler sends it prompt and output separately, and the runner builds all
state from them as for a preempted request. Its random numbers are a function of seed, position and token. In a rank of
the V1 runner the ids are added to the cached state, and a seeded generator makes one draw for each id. This is verified
for the CPU build only.

The disadvantage is the use of private names, listed in the tables below. If a name is missing, or the engine is of a
kind that was not verified (`why_plain`), a request is resumed as a new prompt. It is refused if a new prompt would
change its output (requests.py).
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
"""Private names that ranks of the V1 model runner use."""
V2_SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.core.sched.output.NewRequestData.from_request": ("prefill_token_ids",),
    "vllm.v1.worker.gpu.states.RequestState.add_request": ("prompt_len", "all_token_ids"),
}
"""Private names that ranks of the V2 model runner use."""
SYMBOLS = CORE_SYMBOLS | V1_SYMBOLS | V2_SYMBOLS


def why_plain(config: Any) -> str:
    """Return why an engine with this VllmConfig cannot resume exactly; empty if it can.

    Not checked here: the engine's processes must load the plugin (repairs.loaded_in_ranks).
    """
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
    """Return whether a resumed request with a seed gets the random numbers of the uninterrupted request.

    `installed`: whether the emitted tokens of the request are installed as output. The V1 runner needs these tokens to
    continue a seed; the V2 runner does not. For the V1 runner in vLLM 0.31 the result is False, since its draws were
    not verified. With speculative decoding the result is False, too: the draws depend on the positions at which the
    proposed tokens start, and after a resume these positions differ.
    """
    if config.speculative_config is not None:
        return False
    return bool(config.use_v2_model_runner) or (installed and noise(config) == CPU_32)


def resumes_budgets(config: Any) -> bool:
    """Return whether a resumed request keeps its budget of reasoning tokens.

    Both runners of vLLM count the reasoning tokens in the prompt and in the output. But the end of the
    reasoning may be marked by several tokens. After a resume, the V1 runner does not know how many of these
    tokens have been emitted.
    """
    end = getattr(getattr(config, "reasoning_config", None), "reasoning_end_token_ids", None)
    return bool(config.use_v2_model_runner) or len(end or ()) == 1


V1, V2, CPU_31, CPU_32 = "v1", "v2", "cpu31", "cpu32"
"""Noise schemes. A scheme determines which random numbers a seed gives; see `noise`."""
DRAWS = {"863f32f93b242303": CPU_31, "6d05adf47d121861": CPU_32}
"""Noise scheme of the V1 runner on CPUs, by digest of TopKTopPSampler.forward_cpu.

The body of that function changed between releases, but not the names in it.
"""


def noise(config: Any) -> str:
    """Return the noise scheme of an engine with this VllmConfig: how it draws random numbers for sampling.

    With the same seed, two schemes give different tokens.

    V2 runner: one scheme for vLLM 0.31 to 0.33, murmur3 of seed, position and token.
    V1 runner on CPUs: one scheme for each sampler. vLLM 0.31 draws exponentials over the vocabulary, 0.32 draws one
    number per token, and each unknown sampler is a scheme of its own.
    V1 runner on other devices: one scheme, the device's own generator.
    """
    from vllm.platforms import current_platform

    if config.use_v2_model_runner:
        return V2
    if not current_platform.is_cpu():
        return V1
    try:
        sampler = digest("vllm.v1.sample.ops.topk_topp_sampler.TopKTopPSampler.forward_cpu")
    except (ImportError, AttributeError, OSError):
        sampler = "unknown"
    return DRAWS.get(sampler, f"cpu{sampler}")


def extra_args(emitted_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the `extra_args` of SamplingParams that pass the emitted ids to the engine."""
    return {EXTRA_ARG: list(emitted_token_ids)}


def emitted_of(params: Any) -> list[int]:
    """Return the emitted ids in `params` (SamplingParams or None); empty if there are none."""
    extra = params.extra_args if params is not None else None
    return extra.get(EXTRA_ARG) or [] if extra else []


def install(*, v1_ranks: bool) -> None:
    """Patch vLLM's classes in this process, which is an engine core or a rank. Call once.

    `v1_ranks`: whether to patch the classes of the V1 runner, too. The V2 runner does not use these classes.
    """
    _install_in_core()
    _install_in_grammars()
    if v1_ranks:
        _install_in_ranks()


def _install_in_core() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.metrics.stats import PrefillStats
    from vllm.v1.request import Request

    class ContinuedStats(PrefillStats):  # type: ignore[misc]
        """Prefill statistics over prompt and emitted tokens.

        `bool()` of the statistics is False, so that the scheduler does not fill them in: the scheduler would assert
        that only prompt tokens are cached.
        """

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
        if isinstance(stats, ContinuedStats) and not stats.num_prompt_tokens:  # at the request's first admission
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
    """Let a grammar's matcher accept the emitted tokens one by one.

    The matcher sees each token together with all tokens before it, because it must notice where the reasoning ends and
    the grammar begins. Raises ValueError if the matcher rejects a token; this ends only this request.

    This function runs in a thread while the request waits for its grammar. So it works on a copy of the request's
    record, and at the end copies only `reasoning_ended` back.
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
            for _ in emitted:  # the draw of TopKTopPSampler.forward_cpu, once per token
                torch.randint(0, 2**31, (1,), generator=self.generator, dtype=torch.long)

    CachedRequestState.__post_init__ = __post_init__
