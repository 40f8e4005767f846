"""A chat is converted to JSON for a worker's renderer. The JSON has the fields of vLLM's chat request and the caller's
values."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.calls.tools import REASONING_EFFORTS, arguments_text, call_arguments, template_arguments
from cluster.gateway.text.chat.chat_json import chat_json

USER = {"role": "user", "content": "hi"}


@given(st.sampled_from(['{"a": 1}', '{"a":1}', "", "[1]", "no JSON", '{ "a" : "é" }']))
def test_arguments_keep_the_callers_text(text: str) -> None:
    """The arguments of an earlier tool call are sent exactly as the caller wrote them, even after they were copied to a
    helper process."""
    arguments = call_arguments("messages[0]", text)
    assert arguments == (json.loads(text) if text.lstrip().startswith("{") else {})
    for passed in (arguments, copy.deepcopy(arguments)):
        message = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"arguments": passed}}]}
        sent = json.loads(chat_json([USER, message]))["messages"][1]
        assert sent["tool_calls"][0]["function"]["arguments"] == text
        assert "content" not in sent
    assert arguments_text({"a": "é"}) == '{"a": "é"}'


@given(
    st.sampled_from(["", *REASONING_EFFORTS]),
    st.fixed_dictionaries({}, optional={"enable_thinking": st.booleans(), "x": st.integers()}),
)
def test_an_effort_is_a_field_again(effort: str, given_arguments: dict[str, Any]) -> None:
    """A chat that is sent to vLLM has the reasoning effort in its own field, not among the template arguments. From
    this field, vLLM computes the same template arguments as the gateway does."""
    chat = json.loads(chat_json([USER], template_kwargs=template_arguments(given_arguments, effort)))
    assert chat.get("reasoning_effort", "") == effort
    arguments = chat.get("chat_template_kwargs", {})
    assert template_arguments(arguments, effort) == template_arguments(given_arguments, effort)
    assert "reasoning_effort" not in arguments


def test_a_lone_surrogate_is_refused() -> None:
    """Text that is not valid Unicode is refused with the name of the field."""
    with pytest.raises(CallError, match=r"messages: .*lone surrogate"):
        chat_json([{"role": "user", "content": "\ud800"}])
