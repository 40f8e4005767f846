"""Conversion of an EngineRequest to vLLM's parameters. Every value that could harm the engine is refused here.

vLLM checks many of these values too, but not all. A bad value that reaches the engine core ends the core, and with it
all streams of the replica. So the bounds that protect the process are checked here, before vLLM's own checks.
"""

from __future__ import annotations

import asyncio
import json
import math
from array import array
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.worker.engine.vllm.grammar.grammars import FIELD, check_grammar, structured_outputs
from cluster.worker.engine.vllm.grammar.structural_tags import STRUCTURAL_TAG, check_structural_tag, structural_tag
from cluster.worker.engine.vllm.packed_ids import MIN_IDS
from cluster.worker.engine.vllm.paths import EnginePath
from cluster.worker.engine.vllm.pooling import PoolingBounds, check_pooling, check_task, pooling_params
from cluster.worker.engine.vllm.resume import extra_args

MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_TOKEN_IDS_AFTER_MIN = 128
"""Greatest number of stop ids, EOS ids included, in a request with min_tokens. More would crash vLLM's V2 runner."""
MAX_LOGIT_BIAS = 1024
"""Greatest number of logit_bias entries. More would crash vLLM's V2 runner and thereby the engine core."""
REPETITION_PENALTY_RANGE = (0.01, 100.0)
LOGIT_BIAS_LIMIT = 100.0
MAX_MESSAGE_CHARACTERS = 500
"""Greatest number of characters kept of vLLM's error messages, which can repeat the whole grammar."""
MAX_TEXT_CHARACTERS = 1024
_INT64 = 1 << 63


@dataclass(frozen=True, slots=True)
class RequestBounds:
    """The bounds of the requests that a started engine accepts."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    seeds: bool = True
    eos_token_ids: frozenset[int] = frozenset()
    installs: bool = True
    """Whether the emitted tokens of a resumed request are installed as output (resume.py)."""
    resumes_seeds: bool = True
    """Whether a resumed request with a seed continues with the random numbers of the uninterrupted request."""
    budgets: bool = False
    """Whether the engine can end the reasoning after a number of tokens."""
    resumes_budgets: bool = False
    """Whether a resumed request keeps its budget of reasoning tokens."""
    pooling: PoolingBounds | None = None
    """The bounds of a pooling model, which accepts only pooling requests; None for a model that generates."""
    adapters: Container[str] = ()
    """Digests of the adapters that the engine holds."""


def refused(field: str, description: str, outcome: Outcome = Outcome.INVALID_FIELD) -> EngineRefused:
    """Return the error that refuses a request because of one wrong field."""
    return EngineRefused(outcome.name, f"{field}: {description}", field)


def check(request: EngineRequest, limits: RequestBounds) -> None:
    """Raise EngineRefused for a value on which vLLM would fail, or which vLLM would silently misread."""
    if not request.request_id:
        raise refused("request_id", "must not be empty")
    for field, text in (("request_id", request.request_id), ("cache_salt", request.cache_salt)):
        if len(text) > MAX_TEXT_CHARACTERS or not text.isascii():
            raise refused(field, f"must be ASCII of at most {MAX_TEXT_CHARACTERS} characters")
    if request.adapter and request.adapter not in limits.adapters:
        raise refused("adapter", f"{request.adapter[:MAX_TEXT_CHARACTERS]!r} is not loaded", Outcome.ADAPTER_INVALID)
    if not -_INT64 <= request.priority < _INT64:
        raise refused("priority", "must fit into 64 bits")
    check_task(request.pooling, limits.pooling)
    _check_tokens(request, limits)
    if request.pooling is not None and limits.pooling is not None:
        check_pooling(request.pooling, len(request.prompt_token_ids), limits.pooling.info)
        return
    _check_numbers(request.sampling, limits)
    _check_ids(request.sampling, limits)
    _check_grammar(request.sampling.grammar)
    if request.emitted_token_ids:
        _check_resume(request, limits)


def _check_grammar(grammar: Grammar | None) -> None:
    if grammar is None:
        return
    if grammar.kind == STRUCTURAL_TAG:
        check_structural_tag(grammar)
        return
    try:
        check_grammar(grammar)
    except EngineRefused as error:
        if grammar.field == FIELD:
            raise
        raise refused(grammar.field, f"they make a grammar that is refused: {error.message}") from error


def _check_tokens(request: EngineRequest, limits: RequestBounds) -> None:
    length = len(request.prompt_token_ids) + len(request.emitted_token_ids)
    if not request.prompt_token_ids:
        raise refused("prompt_token_ids", "the prompt has no tokens; send at least one")
    if request.pooling is not None and request.emitted_token_ids:
        raise refused("emitted_token_ids", "a pooling request has no output tokens; leave them out")
    answer = 0 if request.pooling is not None else 1
    if length + answer > limits.max_model_len:
        left = ", of which at least one must be left for the answer" if answer else ""
        raise refused(
            "prompt_token_ids",
            f"the prompt has {length} tokens and the model's context is {limits.max_model_len}{left}: "
            "shorten the prompt",
            Outcome.CONTEXT_LENGTH_EXCEEDED,
        )
    for field, ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("emitted_token_ids", request.emitted_token_ids),
    ):
        if ids and not _all_below(ids, limits.vocab_size):
            raise refused(field, f"token ids must be in [0, {limits.vocab_size})")


def _all_below(ids: Sequence[int], vocab_size: int) -> bool:
    """Return whether all ids are in [0, vocab_size).

    If `ids` is an array (a long prompt), numpy checks it as a whole.
    """
    if isinstance(ids, array):
        import numpy as np

        values = np.frombuffer(ids, np.dtype(ids.typecode))
        return bool(values.min() >= 0 and values.max() < vocab_size)
    return min(ids) >= 0 and max(ids) < vocab_size


def _check_numbers(sampling: Sampling, limits: RequestBounds) -> None:
    bounds: tuple[tuple[str, float, float, float], ...] = (
        ("temperature", sampling.temperature, 0.0, 2.0),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("repetition_penalty", sampling.repetition_penalty, *REPETITION_PENALTY_RANGE),
    )
    for field, value, low, high in bounds:
        if not low <= value <= high:  # NaN fails too
            raise refused(field, f"must be in [{low:g}, {high:g}], got {value:g}")
    if sampling.top_p < 1e-6:
        raise refused("top_p", f"must be above 0, got {sampling.top_p:g}; for greedy decoding set temperature 0")
    if sampling.top_k < -1:
        raise refused("top_k", f"must be 0 (off) or at least 1, got {sampling.top_k}")
    if sampling.max_tokens < 1:
        raise refused("max_tokens", f"must be at least 1, got {sampling.max_tokens}")
    if not 0 <= sampling.min_tokens <= sampling.max_tokens:
        raise refused("min_tokens", f"must be in [0, max_tokens = {sampling.max_tokens}], got {sampling.min_tokens}")
    if sampling.seed is not None:
        if not -_INT64 <= sampling.seed < _INT64:
            raise refused("seed", "must fit into 64 bits")
        if not limits.seeds:
            raise refused("seed", "this engine cannot take seeds", Outcome.UNSUPPORTED_FEATURE)
    _check_budget(sampling, limits)
    most = min(limits.max_logprobs, limits.vocab_size)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= most:
        raise refused("logprobs", f"must be in [0, {most}], got {sampling.logprobs}")


def _check_budget(sampling: Sampling, limits: RequestBounds) -> None:
    budget = sampling.max_reasoning_tokens
    if budget is None:
        return
    if not limits.budgets:
        what = "this model has no budget for reasoning; leave the field out, or set engine.reasoning_parser"
        raise refused("max_reasoning_tokens", what, Outcome.UNSUPPORTED_FEATURE)
    if budget < 0:
        raise refused("max_reasoning_tokens", f"must be at least 0, got {budget}")


def _check_ids(sampling: Sampling, limits: RequestBounds) -> None:
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise refused("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids, got {len(sampling.stop_token_ids)}")
    if sampling.min_tokens:
        _check_ends(sampling, limits)
    if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
        raise refused("logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(sampling.logit_bias)}")
    if any(not 0 <= token < limits.vocab_size for token in sampling.stop_token_ids):
        raise refused("stop_token_ids", f"token ids must be in [0, {limits.vocab_size})")
    if any(not 0 <= token < limits.vocab_size for token in sampling.logit_bias):
        raise refused("logit_bias", f"token ids must be in [0, {limits.vocab_size})")
    if not all(math.isfinite(bias) for bias in sampling.logit_bias.values()):
        raise refused("logit_bias", "biases must be finite numbers")


def _check_ends(sampling: Sampling, limits: RequestBounds) -> None:
    """Refuse too many stop ids.

    The model's EOS ids are counted as well, even with `ignore_eos`, as in vLLM's runner.
    """
    ends = limits.eos_token_ids.union(sampling.stop_token_ids)
    if len(ends) > MAX_STOP_TOKEN_IDS_AFTER_MIN:
        raise refused(
            "stop_token_ids",
            f"at most {MAX_STOP_TOKEN_IDS_AFTER_MIN} ids, including the model's {len(limits.eos_token_ids)} EOS ids, "
            f"if min_tokens is 1 or more, got {len(sampling.stop_token_ids)}",
        )


def _check_resume(request: EngineRequest, limits: RequestBounds) -> None:
    """Refuse a resumed request if its emitted tokens already end it. Also refuse it if it has a parameter with which
    this engine could not continue exactly."""
    sampling = request.sampling
    if len(request.emitted_token_ids) >= sampling.max_tokens:
        raise refused("emitted_token_ids", "reach max_tokens already; the call is at its end")
    ends = set(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else limits.eos_token_ids)
    if not ends.isdisjoint(request.emitted_token_ids):
        raise refused("emitted_token_ids", "include a token that ends the call; the call is at its end")
    plain = not limits.installs
    restarts = (
        ("frequency_penalty", plain and sampling.frequency_penalty != 0),
        ("presence_penalty", plain and sampling.presence_penalty != 0),
        ("seed", not limits.resumes_seeds and sampling.is_seeded),
        (sampling.grammar.field if sampling.grammar else FIELD, plain and sampling.grammar is not None),
        ("max_reasoning_tokens", not limits.resumes_budgets and sampling.max_reasoning_tokens is not None),
    )
    for field, differs in restarts:
        if differs:
            raise refused(
                field, "a call with this parameter cannot be resumed exactly on this engine", Outcome.RESUME_UNSUPPORTED
            )


async def prepare(path: EnginePath, request: EngineRequest, limits: RequestBounds, adapter: Any) -> Any:
    """Convert a checked request, let vLLM validate it, and return it in the form that `path.add` expects.

    If the validation takes long, it runs in a thread. `adapter`: vLLM's LoRARequest, or None. Raises EngineRefused.
    """
    from vllm.exceptions import VLLMError

    def convert() -> Any:
        params = engine_params(request, limits)
        prompt = prompt_of(request, limits)
        reasoning = reasoning_arguments(request)
        return path.prepare(request.request_id, prompt, params, request.priority, reasoning, adapter)

    try:
        return await asyncio.to_thread(convert) if is_heavy(request) else convert()
    except (VLLMError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise refusal(error, request.sampling.grammar.field if request.sampling.grammar else "") from error


def is_heavy(request: EngineRequest, inline_tokens: int = 4096) -> bool:
    """Return whether the validation of a request takes more than about a millisecond, which is too long for the event
    loop."""
    return (request.sampling.grammar is not None and request.pooling is None) or (
        len(request.prompt_token_ids) + len(request.emitted_token_ids) > inline_tokens
    )


def prompt_of(request: EngineRequest, limits: RequestBounds) -> dict[str, Any]:
    """Return vLLM's prompt of token ids, with the cache salt. The ids of a long prompt may be an array.

    A resumed request has token ids that were emitted earlier. If vLLM cannot take these as output, they are
    appended to the prompt.
    """
    emitted = () if limits.installs else request.emitted_token_ids
    ids = request.prompt_token_ids
    if not isinstance(ids, array) or len(ids) < MIN_IDS or emitted:
        ids = [*ids, *emitted]
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": ids}
    if request.cache_salt:
        prompt["cache_salt"] = request.cache_salt
    return prompt


def engine_params(request: EngineRequest, limits: RequestBounds) -> Any:
    """Return vLLM's parameters of a request: PoolingParams for a pooling request, otherwise SamplingParams."""
    if request.pooling is not None and limits.pooling is not None:
        return pooling_params(request.pooling, limits.pooling)
    return sampling_params(request, limits)


def sampling_params(request: EngineRequest, limits: RequestBounds) -> Any:
    """Return vLLM's SamplingParams. In `request`, max_tokens and min_tokens include the emitted tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling, emitted = request.sampling, request.emitted_token_ids
    as_prompt = 0 if limits.installs else len(emitted)
    room = limits.max_model_len - len(request.prompt_token_ids) - as_prompt
    max_tokens = min(sampling.max_tokens - as_prompt, room)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=max(0, min(sampling.min_tokens - as_prompt, max_tokens)),
        extra_args=extra_args(emitted) if emitted and limits.installs else None,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k if 0 < sampling.top_k < limits.vocab_size else 0,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=list(sampling.stop_token_ids),
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=_clamped(sampling),
        logprobs=sampling.logprobs,
        flat_logprobs=sampling.logprobs is not None,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=_structured_outputs(sampling.grammar) if sampling.grammar is not None else None,
        **_budget(sampling),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # created for this request only
    )


def _structured_outputs(grammar: Grammar) -> Any:
    return structural_tag(grammar) if grammar.kind == STRUCTURAL_TAG else structured_outputs(grammar)


def _budget(sampling: Sampling) -> dict[str, Any]:
    """Return vLLM's argument for the budget of reasoning tokens; empty if the request has no budget.

    Without a budget the argument is left out, because some releases of vLLM do not have it.
    """
    return {} if sampling.max_reasoning_tokens is None else {"thinking_token_budget": sampling.max_reasoning_tokens}


def reasoning_arguments(request: EngineRequest) -> dict[str, Any]:
    """Return vLLM's arguments that determine from which token on a grammar applies; empty if vLLM itself determines
    it."""
    grammar = request.sampling.grammar
    if request.pooling is not None or grammar is None or grammar.reasoning_ended is None:
        return {}
    kwargs = json.loads(grammar.template_kwargs) if grammar.template_kwargs else {}
    return {
        "reasoning_ended": grammar.reasoning_ended,
        "reasoning_parser_kwargs": {"chat_template_kwargs": kwargs},
    }


def _clamped(sampling: Sampling) -> dict[int, float] | None:
    """Return the logit biases, limited to the same range as in vLLM's own server; None if there are no biases."""
    limit = LOGIT_BIAS_LIMIT
    return {token: min(limit, max(-limit, bias)) for token, bias in sampling.logit_bias.items()} or None


def refusal(error: Exception, default_field: str = "") -> EngineRefused:
    """Return the error that refuses a request for which vLLM's validation raised `error`.

    The refused field is the parameter that `error` names, or `default_field` if it names none.
    """
    field = getattr(error, "parameter", None) or default_field
    message = str(error.args[0] if error.args else error)[:MAX_MESSAGE_CHARACTERS]
    return EngineRefused(Outcome.INVALID_FIELD.name, f"{field}: {message}" if field else message, field)
