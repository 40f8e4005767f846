"""The request that the engine gets: the caller's request, with the grammar that the parser has made from the request's
tools."""

from __future__ import annotations

from dataclasses import replace

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar
from cluster.worker.parsing import wire

MAX_GRAMMAR_BYTES = 256 << 10
"""Greatest size of a grammar that a parser makes from tools."""


def refused(field: str, reason: str) -> EngineRefused:
    """Return the error that refuses a request.

    `field`: the wrong field of the caller's request; "" if the worker has failed.
    """
    if not field:
        return EngineRefused(Outcome.INTERNAL.name, reason)
    return EngineRefused(Outcome.INVALID_FIELD.name, f"{field}: {reason}", field)


def constrained_from_start(request: EngineRequest) -> EngineRequest:
    """Return a request whose output is not parsed, such as a text completion. Its grammar applies from the first token:
    it has no reasoning whose end the engine could wait for."""
    grammar = request.sampling.grammar
    if grammar is None:
        return request
    return replace(request, sampling=replace(request.sampling, grammar=replace(grammar, reasoning_ended=True)))


def with_grammar(request: EngineRequest, opened: wire.Opened) -> EngineRequest:
    """Return the request with the grammar that its session's reply `opened` contains.

    The reply's values also determine from which token on the grammar applies. Raises EngineRefused for a grammar that
    is too large.
    """
    sampling, text = request.sampling, opened.grammar
    grammar = sampling.grammar
    if text is not None:
        if len(text.value) > MAX_GRAMMAR_BYTES:
            limit = f"at most {MAX_GRAMMAR_BYTES} bytes as a grammar, got {len(text.value)}"
            raise refused("tools", f"{limit}: send fewer or smaller strict tools, or tool_choice auto without strict")
        grammar = Grammar(text.kind, text.values if text.kind == "choice" else text.value, field="tools")
    if grammar is None:
        return request
    grammar = replace(grammar, reasoning_ended=opened.reasoning_ended, template_kwargs=opened.template_kwargs)
    return replace(request, sampling=replace(sampling, grammar=grammar))
