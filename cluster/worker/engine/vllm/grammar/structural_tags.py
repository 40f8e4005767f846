"""Checks of structural tags, the grammars of xgrammar that the output parser makes from a request's tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.ports import EngineRefused
from cluster.api.types import Grammar
from cluster.worker.engine.vllm.grammar.grammar_size import MAX_BOUNDED_STRINGS, bounded_strings
from cluster.worker.engine.vllm.grammar.grammars import check_grammar

STRUCTURAL_TAG = "structural_tag"
MAX_TAG_BYTES = 256 * 1024
MAX_WHITE_SPACE = 24
"""Greatest number of white-space characters in a row in a tool call: a line break and ten levels of indentation by
two."""
MAX_SCHEMAS = 256
"""Greatest number of different schemas of tools in one grammar."""


def _refused(grammar: Grammar, description: str) -> EngineRefused:
    return EngineRefused(Outcome.INVALID_FIELD.name, f"{grammar.field}: {description}", grammar.field)


def check_structural_tag(grammar: Grammar) -> None:
    """Raise EngineRefused for a structural tag that is too large to compile on an engine, or that has a wrong schema.

    A wrong schema is one that would be refused as the schema of `response_format`.
    """
    value = grammar.value
    if not isinstance(value, str) or len(value) > MAX_TAG_BYTES:
        raise _refused(grammar, f"make a grammar of more than {MAX_TAG_BYTES} bytes; send fewer or smaller tools")
    try:
        schemas = {json.dumps(schema): schema for schema in _schemas(json.loads(value))}
    except (ValueError, RecursionError) as error:
        raise _refused(grammar, f"make a grammar that is not valid: {error}") from None
    if len(schemas) > MAX_SCHEMAS:
        raise _refused(grammar, f"at most {MAX_SCHEMAS} different schemas, got {len(schemas)}")
    bounded = sum(len(bounded_strings(schema)) for schema in schemas.values())
    if bounded > MAX_BOUNDED_STRINGS:
        what = f"have {bounded} strings with a pattern or length bound; at most {MAX_BOUNDED_STRINGS} compile in time"
        raise _refused(grammar, what)
    for text in schemas:
        try:
            check_grammar(Grammar("json_schema", text))
        except EngineRefused as error:
            reason = error.message.removeprefix(f"{error.field}: ")
            raise _refused(grammar, f"a schema of a tool {reason}") from None


def _schemas(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the JSON schemas inside a structural tag."""
    if isinstance(value, list):
        for item in value:
            yield from _schemas(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != "json_schema":
                yield from _schemas(item)
            elif isinstance(item, dict):
                yield item


def structural_tag(grammar: Grammar) -> Any:
    """Return a checked structural tag in vLLM's form, with a bound on white space between the values of a tool call.

    Without this bound, a small model may write white space up to `max_tokens` and never complete the tool call.
    """
    from vllm.sampling_params import StructuredOutputsParams

    assert isinstance(grammar.value, str)
    value = json.loads(grammar.value)
    _bound_white_space(value)
    return StructuredOutputsParams(structural_tag=json.dumps(value, ensure_ascii=False))


def _bound_white_space(value: Any) -> None:
    """Set the bound on white space for each JSON schema of a structural tag, in place."""
    if isinstance(value, list):
        for item in value:
            _bound_white_space(item)
    elif isinstance(value, dict):
        if value.get("type") == "json_schema" and value.get("max_whitespace_cnt") is None:
            value["max_whitespace_cnt"] = MAX_WHITE_SPACE
        for name, item in value.items():
            if name != "json_schema":
                _bound_white_space(item)
