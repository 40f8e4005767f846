"""Grammars that an output parser makes from tools, and budgets of reasoning tokens, tested without an engine."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import xgrammar

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.worker.engine.vllm.grammar.structural_tags import (
    MAX_SCHEMAS,
    MAX_TAG_BYTES,
    MAX_WHITE_SPACE,
    structural_tag,
)
from cluster.worker.engine.vllm.requests import RequestBounds, check, reasoning_arguments

LIMITS = RequestBounds(max_model_len=64, vocab_size=100, max_logprobs=20, budgets=True, resumes_budgets=True)


def with_sampling(emitted: tuple[int, ...] = (), **changes: Any) -> EngineRequest:
    """Return a request with the given sampling parameters."""
    return EngineRequest("r", (1, 2, 3), Sampling(max_tokens=4, **changes), emitted_token_ids=emitted)


def tag(*schemas: Any) -> Grammar:
    """Return a grammar of kind `structural_tag` that contains these schemas."""
    tags = [{"begin": "<f>", "content": {"type": "json_schema", "json_schema": schema}} for schema in schemas]
    return Grammar("structural_tag", json.dumps({"format": {"type": "triggered_tags", "tags": tags}}), field="tools")


def refusal_of(request: EngineRequest, limits: RequestBounds = LIMITS) -> EngineRefused:
    """Check a request that must be refused; return the refusal."""
    with pytest.raises(EngineRefused) as refused:
        check(request, limits)
    return refused.value


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("structural_tag", "{", field="tools"), "not valid"),
        (Grammar("structural_tag", "[" * 100_000, field="tools"), "not valid"),
        (Grammar("structural_tag", " " * (MAX_TAG_BYTES + 1), field="tools"), "bytes"),
        (tag(*({"const": at} for at in range(MAX_SCHEMAS + 1))), "schemas"),
        (tag(*({"properties": {f"a{at}": {"maxLength": at}}} for at in range(65))), "strings with a pattern"),
        (tag({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
        (tag({"title": "x" * 70_000}), "bytes"),
        (Grammar("json_schema", "[]", field="tools"), "object"),
    ],
)
def test_a_grammar_of_tools_is_checked_and_its_refusal_names_the_tools(grammar: Grammar, text: str) -> None:
    """A grammar of tools is refused if it is invalid, too large to compile in time, or not supported. The error names
    the field `tools`."""
    refused = refusal_of(with_sampling(grammar=grammar))
    assert (refused.field, refused.reason) == ("tools", "INVALID_FIELD")
    assert text in refused.message


def test_usual_tools_pass() -> None:
    """A structural tag with ordinary schemas is accepted. A schema that is repeated 100 times counts once toward the
    limits."""
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}}
    check(with_sampling(grammar=tag(*[schema] * 100, True)), LIMITS)


def test_a_budget_needs_an_engine_that_enforces_it() -> None:
    """A request with a budget of reasoning tokens is refused if the engine has no budgets, or would lose the budget in
    a resume. The error names the field of the budget."""
    check(with_sampling(max_reasoning_tokens=0), LIMITS)
    without = dataclasses.replace(LIMITS, budgets=False)
    refused = refusal_of(with_sampling(max_reasoning_tokens=5), without)
    assert (refused.field, refused.reason) == ("max_reasoning_tokens", "UNSUPPORTED_FEATURE")
    assert refusal_of(with_sampling(max_reasoning_tokens=-1)).reason == "INVALID_FIELD"
    check(with_sampling((7,), max_reasoning_tokens=5), LIMITS)
    lossy = dataclasses.replace(LIMITS, resumes_budgets=False)
    refused = refusal_of(with_sampling((7,), max_reasoning_tokens=5), lossy)
    assert (refused.field, refused.reason) == ("max_reasoning_tokens", "RESUME_UNSUPPORTED")


def test_the_engine_learns_where_a_grammar_begins() -> None:
    """vLLM gets the place in the output where a grammar begins, in the form that its own server uses. If it gets no
    place, vLLM itself decides where the grammar begins."""
    grammar = dataclasses.replace(tag({}), reasoning_ended=False, template_kwargs='{"enable_thinking": true}')
    assert reasoning_arguments(with_sampling(grammar=grammar)) == {
        "reasoning_ended": False,
        "reasoning_parser_kwargs": {"chat_template_kwargs": {"enable_thinking": True}},
    }
    assert reasoning_arguments(with_sampling(grammar=tag({}))) == {}
    assert reasoning_arguments(with_sampling()) == {}


@pytest.mark.parametrize(("spaces", "accepted"), [(0, True), (MAX_WHITE_SPACE, True), (MAX_WHITE_SPACE + 1, False)])
def test_white_space_in_a_call_is_bounded(spaces: int, accepted: bool) -> None:
    """A model may indent the arguments of a tool call, but cannot fill them with white space."""
    from xgrammar.testing import _is_grammar_accept_string

    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    made = {"format": {"type": "tag", "begin": "<f>", "content": {"type": "json_schema", "json_schema": schema}}}
    made["format"]["end"] = "</f>"
    params = structural_tag(Grammar("structural_tag", json.dumps(made)))
    grammar = xgrammar.Grammar.from_structural_tag(params.structural_tag)
    assert _is_grammar_accept_string(grammar, f'<f>{{"a":{" " * spaces}1}}</f>') is accepted
