"""Invalid Unicode is refused by all APIs. Formerly a lone surrogate in the grammar of a queued call broke the link to a
worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from cluster.admin.v1 import tenants_pb2
from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.grpc import requests
from cluster.gateway.apis.json_values import ARGUMENTS, BODY, JsonBounds, check_counts, parse
from cluster.gateway.apis.openai.fields import read_object
from cluster.gateway.apis.openai.requests import parse_chat
from cluster.gateway.apis.request_ids import request_id, traceparent
from cluster.v1 import inference_pb2 as pb
from tests.support.http import chat_body

LONE = "\ud800"
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": LONE}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}]}, "messages[0].content[0].text"),
    ({"model": LONE}, "model"),
    ({"stop": ["a", LONE]}, "stop[1]"),
    ({"structured_outputs": {"regex": LONE}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": ["a", LONE]}}, "structured_outputs.choice[1]"),
    ({"metadata": {"a": LONE}}, "metadata.a"),
    ({"metadata": {LONE: "a"}}, "metadata"),
    ({"cache_salt": LONE}, "cache_salt"),
    ({"chat_template_kwargs": {"a": [{"b": LONE}]}}, "chat_template_kwargs.a[0].b"),
    ({"not_known": [LONE]}, "not_known[0]"),
]


def _raw(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _escaped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(("fields", "path"), FIELDS, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("written", [_raw, _escaped])
def test_half_a_pair_is_refused_by_its_path(fields: dict[str, Any], path: str, written: Callable[[Any], bytes]) -> None:
    """A lone surrogate in a JSON body is refused, whether it is an escape or the bytes ED A0 80."""
    with pytest.raises(CallError) as raised:
        read_object(written(chat_body(**fields)))
    assert (raised.value.outcome, raised.value.violations[0].field) == (Outcome.INVALID_FIELD, path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_bodies_are_utf_8(encoding: str) -> None:
    """A JSON body in UTF-16 or UTF-32, which JSON parsers accept, is refused."""
    body = json.dumps(chat_body("\ud800x"), ensure_ascii=False).encode(encoding, "surrogatepass")
    with pytest.raises(CallError) as raised:
        read_object(body)
    assert raised.value.violations[0].field == "body"
    assert "UTF-8" in raised.value.message


def test_other_bytes_are_refused_where_they_are() -> None:
    """A JSON body with Latin-1, overlong or out-of-range byte sequences is refused with the offset of the bytes. A byte
    order mark is accepted."""
    for wrong in (b"\xe4", b"\xc0\x80", b"\xf4\x90\x80\x80"):
        with pytest.raises(CallError, match="invalid UTF-8 at byte 7"):
            read_object(b'{"a": "' + wrong + b'"}')
    assert read_object(b'\xef\xbb\xbf{"a": 1}').values == {"a": 1}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"chat_template_kwargs_json": '{"a": "\\ud800"}'}, "chat_template_kwargs_json.a"),
        ({"response_format": pb.ResponseFormat(type="json_schema", json_schema='{"const": "\\udfff"}')},
         "response_format.json_schema.const"),
        ({"messages": [pb.Message(role="assistant", tool_calls=[pb.ToolCall(name="f", arguments='{"a": "\\ud800"}')])]},
         "messages[0].tool_calls[0].arguments.a"),
    ],
    ids=["template arguments", "schema", "tool arguments"],
)  # fmt: skip
def test_json_within_a_message_is_looked_through(fields: dict[str, Any], path: str) -> None:
    """An escaped lone surrogate is refused in a protobuf field that holds a JSON text."""
    request = pb.ChatRequest(model="sim", messages=[pb.Message(role="user", content="x")])
    for name, value in fields.items():
        if name == "messages":
            request.messages.extend(value)
            path = path.replace("[0]", "[1]", 1)
        elif name == "response_format":
            request.response_format.CopyFrom(value)
        else:
            setattr(request, name, value)
    with pytest.raises(CallError) as raised:
        requests.parse_chat(request)
    assert raised.value.violations[0].field == path


def test_tool_arguments_of_a_body_are_looked_through() -> None:
    """A lone surrogate is refused in the arguments of a tool call, which are JSON within JSON."""
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    with pytest.raises(CallError) as raised:
        parse_chat(read_object(json.dumps(chat_body(messages=[{"role": "assistant", "tool_calls": [call]}])).encode()))
    assert raised.value.violations[0].field == "messages[0].tool_calls[0].function.arguments.a"


def _texts(kind: Any) -> list[Any]:
    return [field for field in kind.DESCRIPTOR.fields if field.type == field.TYPE_STRING]


@pytest.mark.parametrize(
    "kind",
    [pb.ChatRequest, pb.Message, pb.ToolCall, pb.ResponseFormat, pb.CompleteRequest, pb.TokenizeRequest,
     pb.SessionStart, pb.GetModelRequest, tenants_pb2.Tenant, tenants_pb2.CreateKeyRequest],
    ids=lambda kind: kind.DESCRIPTOR.name,
)  # fmt: skip
def test_messages_hold_no_surrogates(kind: Any) -> None:
    """protobuf refuses a lone surrogate in every string field, also in repeated fields."""
    for field in _texts(kind):
        raw = (
            bytes([field.number << 3 | 2])
            if field.number < 16
            else bytes([field.number << 3 & 127 | 2 | 128, field.number >> 4])
        )
        with pytest.raises(DecodeError):
            kind.FromString(raw + b"\x03\xed\xa0\x80")


def test_maps_hold_none_either() -> None:
    """protobuf refuses a lone surrogate in a key or a value of the metadata map."""
    for at in (b"\x0a\x03\xed\xa0\x80", b"\x12\x03\xed\xa0\x80"):
        with pytest.raises(DecodeError):
            pb.ChatRequest.FromString(b"\xfa\x01\x05" + at)


@pytest.mark.parametrize("value", ["abc\n", "a b", "", "x" * 129, "ä", "\x1b[31m", None, b"abc", "x" * 10_000_000])
def test_ids_of_requests_are_printable_and_short(value: object) -> None:
    """A request id or traceparent that is not short and printable is replaced by "", also if only a trailing newline is
    wrong."""
    assert request_id(value) == ""
    assert traceparent(value) == ""


def test_good_ids_pass() -> None:
    """Valid request ids and traceparents are returned unchanged."""
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    assert (request_id("r-1"), request_id("!" * 128), traceparent(trace)) == ("r-1", "!" * 128, trace)
    assert traceparent(trace + "\n") == ""


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=6),
    max_leaves=40,
)


def _containers(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + sum(map(_containers, inner))


def _strings(value: Any) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(_strings, value.values()))
    return isinstance(value, str) or (isinstance(value, list) and sum(map(_strings, value)))


@given(value=VALUES, slack=st.integers(-1, 0), escaped=st.booleans())
def test_counts_are_exact(value: Any, slack: int, escaped: bool) -> None:
    """A JSON text is refused if it has one container or one string more than allowed. Characters inside a string do not
    count as containers or strings."""
    noise = '\\"[{,\\' * 4000
    text = json.dumps([noise, value], ensure_ascii=escaped).encode()
    containers, strings = 1 + _containers(value), 1 + _strings(value)
    for bounds in (JsonBounds(containers + slack, 10**6, 10**6), JsonBounds(10**6, strings + slack, 10**6)):
        if slack:
            with pytest.raises(CallError):
                check_counts("x", text, bounds)
        else:
            check_counts("x", text, bounds)


@given(VALUES)
def test_parsing_is_json_s(value: Any) -> None:
    """An accepted JSON text is parsed to the same value that `json.loads` returns."""
    assert parse("x", json.dumps(value)) == value
    assert parse("x", json.dumps(value, ensure_ascii=False).encode(), BODY) == value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "[" * 129 + "]" * 129, "[[],[]," * 9])
def test_deep_and_broken_json_is_a_wrong_field(text: str) -> None:
    """Deeply nested or invalid JSON is reported as an invalid field, not as an unexpected failure."""
    with pytest.raises(CallError) as raised:
        parse("chat_template_kwargs_json", text, ARGUMENTS)
    assert raised.value.violations[0].field == "chat_template_kwargs_json"
