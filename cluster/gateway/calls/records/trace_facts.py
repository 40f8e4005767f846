"""The facts about a sampled call that its trace records. They contain no text of the call."""

from __future__ import annotations

from dataclasses import replace

from cluster.api.outcomes import Outcome
from cluster.api.pooling import PoolingTask
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_opening import PoolingOpening
from cluster.gateway.tracing.call_trace import MAX_ATTEMPTS, CallFacts, SequenceFacts
from cluster.observe import semantic_conventions as names

MAX_NAME = 128
"""Maximum number of characters that are kept of a name that comes from the caller."""


def call_facts(opening: Opening | PoolingOpening, outcome: Outcome, now: float) -> CallFacts:
    """Return what the spans of a call report about it, for a call that has ended or could not begin."""
    call, meta, request = opening.call, opening.meta, opening.request
    options = request.options if isinstance(request, requests.GenerationRequest) else requests.RequestOptions()
    common = CallFacts(
        operation=_operation(opening),
        outcome=outcome.value,
        ended_at=now,
        api=meta.api,
        tenant=meta.tenant,
        request_id=meta.request_id,
        requested_model=request.model[:MAX_NAME] or opening.model_name,
        is_known_model=bool(opening.model_name),
        is_error=outcome not in (Outcome.OK, Outcome.CANCELLED),
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    return common if call is None else _with_call(common, call)


def _operation(opening: Opening | PoolingOpening) -> str:
    if isinstance(opening, Opening):
        return names.CHAT if requests.is_chat(opening.request.prompt) else names.TEXT_COMPLETION
    call = opening.call
    is_score = isinstance(call, PoolingCall) and call.task is PoolingTask.SCORE
    return names.SCORE if is_score else names.EMBEDDINGS


def _with_call(facts: CallFacts, call: Call) -> CallFacts:
    usage = call.usage
    usage.count_tokens(call.sequences)
    sequences = tuple(
        SequenceFacts(len(sequence.emitted), sequence.finish_reason, sequence.tool_parser)
        for sequence in call.sequences[:MAX_ATTEMPTS]
    )
    return replace(
        facts,
        request_id=call.request_id,
        model=call.shown_model,
        is_known_model=True,
        version=call.versions.first if call.began_at is None else call.began_at.version,
        response_id=call.shown_id,
        priority_class=call.policy.priority_class,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        ttft_s=None if call.first_token_at is None else call.first_token_at - call.arrived,
        resumes=usage.resumed,
        is_continued=call.is_resumed,
        sequences=sequences,
    )
