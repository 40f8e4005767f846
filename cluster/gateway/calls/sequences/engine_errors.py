"""Conversion of an engine's reports about a request into errors for the caller."""

from __future__ import annotations

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import SLOW_GRAMMAR, EngineRequest, FinishReason

FAILED = (FinishReason.ERROR, FinishReason.ABORT)
"""Finish reasons of an engine after which another engine may continue the sequence."""

CALLER_FIELDS = {"prompt_token_ids": "prompt", "grammar": "response_format", "structured_outputs": "response_format"}
"""Callers' names of request fields, keyed by the engine's name of the field."""


def refusal_of(reason: str, message: str, field: str) -> CallError:
    """Translate an engine's refusal into the error for the caller. The engine's message begins with the engine's name
    for the field. This name is replaced with the caller's name for the field."""
    outcome = Outcome.__members__.get(reason, Outcome.INTERNAL)
    if not field:
        return CallError(outcome, message)
    name, message = CALLER_FIELDS.get(field, field), message.removeprefix(f"{field}: ")
    return CallError(outcome, f"{name}: {message}", violations=[Violation(name, message)])


def format_error(request: EngineRequest, finish: FinishReason, message: str = "") -> CallError | None:
    """Return the error for the caller if an output has ended because its required format allows no further token, or
    slows the engine. The engine ends such an output with ERROR and `message`. Returns None if the output has ended for
    another reason."""
    parsing = request.parsing
    field = "tools" if parsing is not None and parsing.needs_tools else "response_format"
    if finish is not FinishReason.ERROR or (request.sampling.grammar is None and field != "tools"):
        return None
    if message == SLOW_GRAMMAR:
        return invalid(field, message)
    return invalid(
        field,
        "no further token fits this format together with the call's other fields "
        "(nothing fits the format, or it needs one of stop_token_ids); change one of them",
    )
