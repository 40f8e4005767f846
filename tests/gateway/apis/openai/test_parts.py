"""Tests of OpenAI stream events for parsed outputs. `ChatStream` has a fast path for common parts; its events must
equal those of the general path."""

from __future__ import annotations

import json
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.apis.openai.answers import ChatStream
from cluster.gateway.calls.sequences.pieces import Piece


@given(st.text(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.booleans())
def test_a_fragment_of_arguments(text: str, number: int, index: int, shift: int, include_usage: bool) -> None:
    """An event with a fragment of tool arguments is the same on the fast path as on the general path."""
    call = cast(Any, None)  # fragments need nothing of their call
    stream = ChatStream("id", "model", 1, include_usage=include_usage)
    part = OutputPart(PartKind.TOOL_ARGUMENTS, text, number)
    short = stream.events(call, [Piece(index, "", "", [], False, [part])], shift)
    both = [part, OutputPart(PartKind.TOOL_ARGUMENTS, "", number)]
    long = stream.events(call, [Piece(index, "", "", [], False, both)], shift)
    assert short == long
    delta = json.loads(short.removeprefix(b"data: "))["choices"][0]["delta"]
    assert delta == {"tool_calls": [{"index": number, "function": {"arguments": text}}]}
