"""Tests of the load-test part `strict`: the engine's schema checks accept the schemas of the part, and the part detects
wrong tool calls."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.engine.vllm.grammar.schema_keywords import check_schema
from loadtests.agents.compare import Answer, ToolCall
from loadtests.agents.strict import body, parameters, why_wrong

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}},
    "required": ["city"],
    "additionalProperties": False,
}
REQUEST = {"tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]}


def answer(name: str, arguments: str, finish: str = "tool_calls") -> Answer:
    """Return an answer with one tool call."""
    return Answer(finish, calls=(ToolCall(name, arguments),))


@given(st.integers())
def test_every_schema_is_enforced_by_grammars(seed: int) -> None:
    check_schema("parameters", parameters(random.Random(seed)))
    json.dumps(body(random.Random(seed)))


def test_a_valid_call_is_right() -> None:
    assert not why_wrong(answer("f", '{"city": "Rome"}'), REQUEST)


@pytest.mark.parametrize(
    "wrong",
    [
        answer("g", '{"city": "Rome"}'),
        answer("f", '{"city": "Berlin"}'),
        answer("f", '{"city": "Rome"'),
        answer("f", "{}"),
        answer("f", '{"city": "Rome", "x": 1}'),
        answer("f", '{"city": "Rome"}', "stop"),
        Answer("tool_calls"),
        Answer(error="500"),
    ],
)
def test_a_wrong_answer_is_found(wrong: Answer) -> None:
    assert why_wrong(wrong, REQUEST)
