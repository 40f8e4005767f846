"""Errors of callers that engines report."""

from __future__ import annotations

import pytest

from cluster.api.outcomes import Outcome
from cluster.api.output_parts import OutputParsing
from cluster.api.types import SLOW_GRAMMAR, EngineRequest, FinishReason, Grammar, Sampling
from cluster.gateway.calls.sequences.engine_errors import format_error

FORMAT = EngineRequest("r", (1,), Sampling(max_tokens=4, grammar=Grammar("regex", "a")))
TOOLS = EngineRequest("r", (1,), Sampling(max_tokens=4), parsing=OutputParsing("{}", needs_tools=True))


@pytest.mark.parametrize(("request_", "field"), [(FORMAT, "response_format"), (TOOLS, "tools")])
def test_a_slow_grammar_is_the_callers_error_and_names_its_field(request_: EngineRequest, field: str) -> None:
    """The error of an output that its grammar has made slow says so and names the field; other errors that a grammar
    may have caused say that no token fits."""
    slow = format_error(request_, FinishReason.ERROR, SLOW_GRAMMAR)
    other = format_error(request_, FinishReason.ERROR, "the engine failed on this request")
    assert slow is not None
    assert other is not None
    assert (slow.outcome, slow.message) == (Outcome.INVALID_FIELD, f"{field}: {SLOW_GRAMMAR}")
    assert "no further token fits" in other.message
