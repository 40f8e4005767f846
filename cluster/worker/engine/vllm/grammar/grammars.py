"""Grammars that constrain outputs: checks of the grammars that an engine accepts, and conversion to vLLM's form."""

from __future__ import annotations

import json
import re
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import Grammar
from cluster.worker.engine.vllm.grammar.grammar_size import MAX_REGEX_POSITIONS, regex_positions
from cluster.worker.engine.vllm.grammar.pattern_counts import count_problem
from cluster.worker.engine.vllm.grammar.schema_keywords import check_schema

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_CHOICES = 1024
MAX_REGEX_BYTES = 4096
FIELD = "response_format"

_TEXT_KINDS = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}


def _refused(kind: str, description: str) -> EngineRefused:
    return EngineRefused(Outcome.INVALID_FIELD.name, f"{FIELD}.{kind}: {description}", f"{FIELD}.{kind}")


def check_grammar(grammar: Grammar) -> None:
    """Raise EngineRefused for an unknown kind, a wrong value, or a grammar too large to compile on an engine."""
    kind, value = grammar.kind, grammar.value
    if kind == "choice":
        _check_choice(value)
    elif kind == "json_object":
        if value:
            raise _refused(kind, "takes no value")
    elif kind in _TEXT_KINDS:
        _check_text(kind, value)
    else:
        known = ", ".join(sorted([*_TEXT_KINDS, "choice", "json_object"]))
        raise EngineRefused(Outcome.INVALID_FIELD.name, f"{FIELD}: kind {kind!r} is not one of {known}", FIELD)


def _check_choice(value: str | tuple[str, ...]) -> None:
    if isinstance(value, str) or not value:
        raise _refused("choice", "needs at least one string to choose from")
    if len(value) > MAX_CHOICES:
        raise _refused("choice", f"at most {MAX_CHOICES} strings, got {len(value)}")
    for choice in value:
        _check_unicode("choice", choice)
    if any(not choice for choice in value):
        raise _refused("choice", "an empty string cannot be chosen")
    if sum(len(choice.encode()) for choice in value) > MAX_GRAMMAR_BYTES:
        raise _refused("choice", f"at most {MAX_GRAMMAR_BYTES} bytes in all")


def _check_text(kind: str, value: str | tuple[str, ...]) -> None:
    if not isinstance(value, str) or (kind != "regex" and not value.strip()):
        raise _refused(kind, "must be a string that is not empty")
    _check_unicode(kind, value)
    limit = MAX_REGEX_BYTES if kind == "regex" else MAX_GRAMMAR_BYTES
    size = len(value.encode())
    if size > limit:
        raise _refused(kind, f"at most {limit} bytes, got {size}")
    if kind == "json_schema":
        _check_schema(value)
    if kind == "regex":
        _check_regex(value)


_TOKEN = re.compile(r"\\k|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:<?[=!]|>|\(|P=)", re.DOTALL)
_UNSUPPORTED = {
    **dict.fromkeys(("(?=", "(?!", "(?<=", "(?<!"), "look-ahead and look-behind"),
    **dict.fromkeys(("(?>", "(?("), "atomic and conditional groups"),
    **dict.fromkeys(("\\b", "\\B"), "word boundaries"),
    **dict.fromkeys(("\\A", "\\Z", "\\z", "\\G"), "anchors other than ^ and $"),
    **dict.fromkeys(("(?P=", "\\k", *(f"\\{digit}" for digit in range(1, 10))), "back references"),
}
"""Regex syntax that no backend of vLLM compiles, with its name. Some backends would read such an escape as a plain
letter."""


def _check_regex(pattern: str) -> None:
    unsupported = next((what for token in _TOKEN.findall(pattern) if (what := _UNSUPPORTED.get(token))), None)
    if unsupported is not None:
        raise _refused("regex", f"{unsupported} are not supported in expressions; write the expression without them")
    positions = regex_positions(pattern)
    if positions > MAX_REGEX_POSITIONS:
        raise _refused("regex", f"unrolls to {positions} positions, at most {MAX_REGEX_POSITIONS}: repeat fewer times")
    if problem := count_problem(pattern):
        raise _refused("regex", f"the expression {problem}")


def _check_unicode(kind: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # lone surrogates, which a Python string can contain
        raise _refused(kind, "is not valid Unicode") from None


def _check_schema(value: str) -> None:
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _refused("json_schema", f"is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise _refused("json_schema", "must be a JSON object")
    check_schema(f"{FIELD}.json_schema", schema)


def structured_outputs(grammar: Grammar) -> Any:
    """Return a checked grammar in vLLM's form."""
    from vllm.sampling_params import StructuredOutputsParams

    if grammar.kind == "choice":
        return StructuredOutputsParams(choice=list(grammar.value))
    if grammar.kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(**{_TEXT_KINDS[grammar.kind]: grammar.value})
