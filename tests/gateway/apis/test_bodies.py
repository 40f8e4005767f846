"""Large request bodies. A helper process parses them, with the same result as the parser of small bodies. The number of
values is checked before parsing, and only known fields are parsed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis import bodies as bodies_module
from cluster.gateway.apis.bodies import Bodies
from cluster.gateway.apis.body_parser import BodyReader, check_request
from cluster.gateway.apis.grpc.packed_ids import packed_ids
from cluster.gateway.apis.grpc.requests import READ, options_of, session_items
from cluster.gateway.apis.openai.fields import Fields, read_object
from cluster.gateway.apis.openai.requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    ParsedRequest,
    parse_chat,
    parse_completion,
)
from cluster.gateway.calls.request import MAX_MESSAGES, GenerationRequest, IdsPrompt, PackedPrompt, check_options
from cluster.v1 import inference_pb2 as pb
from cluster.wire.message_scan import scan
from tests.support.calls import chat, complete
from tests.support.cpu import cpu_within
from tests.support.fuzz import messages
from tests.support.http import chat_body, completion_body

PARSERS = {"chat": parse_chat, "completion": parse_completion}
READER = BodyReader()
NUMBERS = st.none() | st.booleans() | st.integers(-3, 2**33) | st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=6) | st.sampled_from(["user", "assistant", "text", "json_object", "json_schema", "none", "{}"])
ANY = st.recursive(
    NUMBERS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(WORDS | st.sampled_from(["type", "role", "content", "text", "schema"]), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "king"])}, optional={"content": WORDS | ANY}),
    max_size=4,
)


def _outcome(read: Any) -> Any:
    """Return the parsed request with unpacked prompts. If parsing fails, return the outcome and the invalid fields."""
    try:
        parsed: ParsedRequest = read()
    except CallError as error:
        return error.outcome, [v.field for v in error.violations]
    return replace(parsed, requests=[_plain(request) for request in parsed.requests])


def _plain(request: GenerationRequest) -> GenerationRequest:
    if isinstance(request.prompt, PackedPrompt):
        return replace(request, prompt=request.prompt.unpacked())
    if isinstance(request.prompt, IdsPrompt):
        return replace(request, prompt=IdsPrompt([int(token_id) for token_id in request.prompt.token_ids]))
    return request


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(["chat", "completion"]), data=st.data())
def test_large_bodies_are_read_as_small_ones(name: str, data: st.DataObject) -> None:
    """For any body, the parser of large bodies and the parser of small bodies yield the same request or the same
    invalid field."""
    fields = sorted(CHAT_FIELDS if name == "chat" else COMPLETION_FIELDS)
    good = chat_body() if name == "chat" else completion_body()
    odd_field = st.tuples(st.sampled_from([*fields, "not_known"]), ANY)
    messages_ = st.tuples(st.just("messages"), MESSAGES)
    body = json.dumps(good | dict([data.draw(odd_field | messages_)]), ensure_ascii=data.draw(st.booleans())).encode()

    def at_once() -> ParsedRequest:
        parsed = PARSERS[name](read_object(body))
        check_request(parsed.requests[0], parsed.names)  # as the service checks first
        return parsed

    assert _outcome(lambda: READER.http(body, name)) == _outcome(at_once)


@given(st.lists(st.integers(-1, 300_000), min_size=1, max_size=50), st.text(" \n\t", max_size=3))
def test_token_ids_become_an_array(ids: list[int], space: str) -> None:
    """The parser of large bodies returns the token ids of a prompt as an array of the same numbers."""
    body = f'{{"prompt":{space}{json.dumps(ids)}{space},"model":"m"}}'.encode()
    (request,) = READER.http(body, "completion").requests
    assert isinstance(request.prompt, IdsPrompt)
    assert np.asarray(request.prompt.token_ids).dtype == np.int32
    assert list(request.prompt.token_ids) == ids


class _Recording(dict[str, Any]):
    """A dictionary that records which names are looked up."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def test_no_field_that_is_read_is_skipped() -> None:
    """The splitter of large bodies passes on every field that the parser reads. A field that it dropped would be lost
    in large bodies only."""
    for parse, body, known in (
        (parse_chat, chat_body(logprobs=True, stream=True), CHAT_FIELDS),
        (parse_completion, completion_body(stream=True), COMPLETION_FIELDS),
    ):
        values = _Recording(body)
        parse(Fields(values))
        assert values.asked <= known


DENSE: list[tuple[str, bytes, str]] = [
    ("messages", b'{"messages":[' + b'{"role":"user"},' * 480_000 + b'{"role":"user"}]}', "messages"),
    (
        "a few too many messages",
        b'{"messages":[' + b'{"role":"user"},' * MAX_MESSAGES + b'{"role":"user"}]}',
        "messages",
    ),
    ("nested lists", b'{"chat_template_kwargs":{"x":[' + b"[]," * 1_000_000 + b"[]]}}", "chat_template_kwargs"),
    ("biases", b'{"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(500_000)) + b"}}", "logit_bias"),
    ("stops", b'{"stop":[' + b'"",' * 1_000_000 + b'""]}', "stop"),
    ("stop ids", b'{"stop_token_ids":[' + b"1," * 3_000_000 + b"1]}", "stop_token_ids"),
    ("deep", b'{"messages":' + b"[" * 300_000 + b"]" * 300_000 + b"}", "body"),
    ("open", b'{"messages":' + b"[" * 300_000, "body"),
    ("an array", b"[" + b"1," * 300_000 + b"1]", "body"),
    ("no text", b'{"model":"' + b"\xed\xa0\x80" * 100_000 + b'"}', "model"),
    ("latin", b'{"model":"' + b"\xe4" * 100_000 + b'"}', "model"),
    ("unknown fields", b"{" + b",".join(b'"a%d":1' % i for i in range(300_000)) + b"}", "messages"),
    ("unknown lists", b'{"x":[' + b"[]," * 1_000_000 + b"[]]}", "messages"),
]


@pytest.mark.parametrize(("body", "field"), [(b, f) for _, b, f in DENSE], ids=[n for n, _, _ in DENSE])
def test_what_holds_too_much_is_refused_by_its_field(body: bytes, field: str) -> None:
    """A body that exceeds its bounds is refused before it is parsed. The refusal takes far less than the 100 ns a byte
    that parsing takes."""
    with cpu_within(0.2 + 40e-9 * len(body)), pytest.raises(CallError) as raised:
        READER.http(body, "chat")
    assert raised.value.violations[0].field == field


def test_too_many_ids_are_refused_by_their_number() -> None:
    """A request with 7.5 million token ids is refused before it is parsed. A request with a million token ids, which is
    a long context, is accepted."""
    with pytest.raises(CallError) as raised:
        READER.http(b'{"prompt":[' + b"1," * 7_500_000 + b"1]}", "completion")
    assert raised.value.violations[0].field == "prompt"
    (request,) = READER.http(b'{"model":"m","prompt":[' + b"1," * 1_000_000 + b"1]}", "completion").requests
    assert isinstance(request.prompt, IdsPrompt)
    assert len(request.prompt.token_ids) == 1_000_001


# ---- protobuf


def _count(message: Any) -> int:
    """Return the number of fields and list elements that a message has when it is serialized. A packed list of numbers
    counts as one field."""
    total = 0
    for field, value in message.ListFields():
        entry = field.message_type is not None and field.message_type.GetOptions().map_entry
        if entry:
            total += 3 * len(value)
        elif field.message_type is not None:
            total += sum(1 + _count(item) for item in (value if field.is_repeated else [value]))
        elif field.is_repeated:
            packed = field.cpp_type not in (field.CPPTYPE_STRING,)
            total += 1 if packed else len(value)
        else:
            total += 1
    return total


@given(messages(pb.ChatRequest))
def test_a_scan_counts_what_a_message_holds(request_: Any) -> None:
    """A scan counts the elements at all levels of a message. If the message has more elements than the bound, the scan
    stops at the first element above the bound."""
    data = request_.SerializeToString()
    found = scan(pb.ChatRequest.DESCRIPTOR, data, 10**6, count_numbers=True)
    assert found.elements == _count(request_)
    if found.elements > 3:
        assert scan(pb.ChatRequest.DESCRIPTOR, data, 3, count_numbers=True).elements == 4


@given(st.binary(max_size=200))
def test_a_scan_of_anything_ends(data: bytes) -> None:
    """A scan of any bytes counts at most one element for each byte and then ends, even if the bytes are malformed."""
    assert scan(pb.SessionRequest.DESCRIPTOR, data, 50).elements <= 51 + len(data)


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + _varint(value >> 7)


def _delimited(number: int, parts: list[bytes]) -> bytes:
    data = b"".join(parts)
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _group(number: int, parts: list[bytes]) -> bytes:
    return _varint(number << 3 | 3) + b"".join(parts) + _varint(number << 3 | 4)


FIELD_NUMBERS = st.sampled_from([1, 2, 3, 4, 5, 11, 16, 21, 24, 31, 100, 500])
ON_THE_WIRE = st.recursive(
    st.builds(lambda number, value: _varint(number << 3) + _varint(value), FIELD_NUMBERS, st.integers(0, 300))
    | st.builds(lambda number: _varint(number << 3 | 5) + bytes(4), FIELD_NUMBERS),
    lambda inner: st.tuples(st.sampled_from([_delimited, _group]), FIELD_NUMBERS, st.lists(inner, max_size=4)).map(
        lambda made: made[0](made[1], made[2])
    ),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(ON_THE_WIRE, max_size=6).map(b"".join))
def test_a_scan_counts_all_that_protobuf_makes(data: bytes) -> None:
    """The number of elements that a scan counts in a message is at least the number of objects that protobuf builds for
    the message. This also holds for messages with unknown fields, and with groups at all levels."""
    try:
        made = pb.SessionRequest.FromString(data)
    except DecodeError:
        return
    assert scan(pb.SessionRequest.DESCRIPTOR, data, 10**6).elements >= _count(made)


@pytest.mark.parametrize(
    ("name", "data", "field"),
    [
        ("Chat", b"\x12\x00" * 480_000, "messages"),
        ("Chat", _group(500, []) + b"\x12\x00" * 480_000, "messages"),
        ("Chat", _group(500, [_group(501, [b"\x08\x01"]), b"\x12\x01x"]) + b"\x52\x00" * 480_000, "stop"),
        ("Chat", _delimited(2, [_group(500, []), b"\x1a\x00" * 480_000]), "messages"),
        ("Chat", _group(500, []) * 300_000, "request"),
        ("Chat", _group(500, [b"\x08\x01" * 300_000]), "request"),
        ("Chat", b"\x12\x08\x0a\x04user\x1a\x00" * 150_000, "messages"),
        ("Chat", (b"\x12\x06\x0a\x04user") * (MAX_MESSAGES + 1), "messages"),
        ("Tokenize", b"\x1a\x00" * 480_000, "messages"),
        ("Chat", b"\x52\x00" * 480_000, "stop"),
        ("Chat", b"\x82\x01\x00" * 480_000, "logit_bias"),
        ("Chat", b"\xc0\x3e\x01" * 480_000, "request"),
        ("Resume", b"\x12\x00" * 600_000, "resume_tokens"),
        ("Complete", pb.CompleteRequest(prompt_token_ids=[1] * 7_500_000).SerializeToString(), "prompt_token_ids"),
        ("Chat", chat(chat_template_kwargs_json='{"x":[' + "[]," * 1_000_000 + "[]]}").SerializeToString(),
         "chat_template_kwargs_json"),
        ("GetModel", b"\x10\x01" * 600_000, "request"),
        ("Chat", b"\xff" * 1_000_000, "request"),
    ],
    ids=["messages", "behind a group", "behind groups in a group", "a group in a message", "groups", "one group",
         "messages with parts", "a few too many", "tokenize", "stop", "biases", "unknown", "tokens", "ids",
         "arguments", "model", "malformed"],
)  # fmt: skip
def test_messages_that_hold_too_much_are_refused_by_their_field(name: str, data: bytes, field: str) -> None:
    """A message that exceeds its bounds is refused before protobuf parses it. Parsing could build one object for every
    two bytes."""
    with cpu_within(0.2 + 40e-9 * len(data)), pytest.raises(CallError) as raised:
        READER.message(data, name)
    assert raised.value.violations[0].field == field


@given(messages(pb.ChatRequest, model=st.just("m")))
def test_large_messages_are_read_as_small_ones(request_: Any) -> None:
    """For any message, the parser of large messages and the parser of small messages yield the same request or the same
    error."""
    call, data = READ["Chat"], request_.SerializeToString()

    def read(way: Any) -> Any:
        try:
            return _plain(way())
        except CallError as error:
            return error.message

    def at_once() -> GenerationRequest:
        check_options(options_of(request_))
        request: GenerationRequest = call.read(request_)
        check_request(request, {})
        return request

    assert repr(read(lambda: READER.message(data, "Chat"))) == repr(read(at_once))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, 200), max_size=60), st.booleans())
def test_packed_ids_are_read_as_protobuf_does(ids: list[int], small: bool) -> None:
    """Packed token ids of any size and sign are decoded to the same numbers as by protobuf. Unpacked token ids are left
    to protobuf."""
    ids = [abs(token_id) % 128 for token_id in ids] if small else ids
    request_ = pb.CompleteRequest(model="m", prompt_token_ids=ids, temperature=1.0, stop=["a"], n=2)
    found = packed_ids(request_.SerializeToString(), 100)
    assert found is not None
    assert found.tolist() == ids
    assert packed_ids(b"\xa0\x06\x05" * 3, 100) is None
    many = pb.CompleteRequest(model="m", prompt_token_ids=[*ids, 7] * 5000)
    request = READER.message(many.SerializeToString(), "Complete")
    assert list(request.prompt.token_ids) == list(many.prompt_token_ids)


# ---- where they are read


@pytest.fixture
async def bodies() -> AsyncIterator[Bodies]:
    """Create a Bodies object, and stop its helper processes after the test."""
    made = Bodies()
    yield made
    made.close()


@pytest.mark.slow
async def test_what_is_large_is_read_by_a_helper(bodies: Bodies) -> None:
    """Helper processes parse large HTTP bodies, gRPC messages and session messages. The results and errors are the same
    as for small bodies."""
    bodies.pool.patience_s = 60  # the helper's start may wait for a core that long
    long = "hello, " * 300_000
    parsed = await bodies.http("chat", json.dumps(chat_body(long)).encode())
    assert bodies.pool.pids
    (request,) = parsed.requests
    assert isinstance(request.prompt, PackedPrompt)
    assert _plain(request) == _plain(parse_chat(Fields(chat_body(long))).requests[0])
    request = await bodies.message("Complete", complete(long).SerializeToString())
    assert _plain(request) == READ["Complete"].read(complete(long))
    with pytest.raises(CallError, match="messages"):
        await bodies.http("chat", DENSE[0][1])
    message = pb.SessionRequest(
        start=pb.SessionStart(call_id=1, chat=chat(long)),
        more=[pb.SessionRequest(cancel=pb.SessionCancel(call_id=i)) for i in range(3)],
    )
    items = await bodies.session(message.SerializeToString())
    assert isinstance(items, list)
    assert [type(item).__name__ for item in items] == ["SessionStart", *["SessionCancel"] * 3]
    first, *rest = session_items(message)
    assert rest == items[1:]
    assert replace(items[0], request=_plain(items[0].request)) == first


async def test_large_bodies_that_come_together_take_turns(bodies: Bodies) -> None:
    """Other tasks of the event loop run between any two bodies of hundreds of kilobytes that arrive together."""
    text = "The river turns the wheel. " * 10_000
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    passes, read = 0, []

    async def one() -> None:
        await bodies.http("chat", body)
        read.append(passes)

    tasks = [asyncio.create_task(one()) for _ in range(5)]
    while not all(task.done() for task in tasks):
        passes += 1
        await asyncio.sleep(0)
    assert len(set(read)) == len(read) == 5
    assert not bodies.pool.pids


async def test_small_bodies_start_no_helper(bodies: Bodies) -> None:
    """Small bodies are parsed on the event loop."""
    for text in ("hello", "hello, " * 8000):
        await bodies.http("chat", json.dumps(chat_body(text)).encode())
        await bodies.message("Chat", chat(text).SerializeToString())
    assert not bodies.pool.pids


async def test_without_helpers_a_thread_reads(bodies: Bodies) -> None:
    """If no helper process can be started, a large body is parsed in a thread."""
    bodies.close()
    (request,) = (await bodies.http("chat", json.dumps(chat_body("x" * 2_000_000)).encode())).requests
    assert isinstance(request.prompt, PackedPrompt)
    assert bodies_module.LARGE_BYTES < 2_000_000
    await asyncio.sleep(0)


def test_more_ids_than_any_context_holds_are_refused_by_their_number() -> None:
    """A prompt with more token ids than any model's context is refused before a list of the ids is built. Building the
    list takes 20 ms for a million ids."""
    body = b'{"model":"m","prompt":[' + b"1," * 5000 + b"-1]}"
    with pytest.raises(CallError, match="prompt: has 5001 token ids") as caught:
        READER.http(body, "completion", 5000)
    assert caught.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
    many = pb.CompleteRequest(model="m", prompt_token_ids=[1] * 200_000).SerializeToString()
    with pytest.raises(CallError, match="prompt_token_ids: has 200000 token ids"):
        READER.message(many, "Complete", 100_000)
    assert len(READER.message(many, "Complete", 200_000).prompt.token_ids) == 200_000


async def test_a_small_request_that_is_large_is_refused_unread() -> None:
    """If all fields of a method's request are short, a large request is refused before it is parsed."""
    bodies = Bodies()
    for name, request, field in (
        ("GetModel", pb.GetModelRequest(name="x" * 70_000), "name"),
        ("ListModels", pb.ListModelsRequest(page_token="x" * 70_000), "page_token"),
    ):
        with pytest.raises(CallError, match="at most 65536 are allowed") as caught:
            await bodies.message(name, request.SerializeToString())
        assert caught.value.violations[0].field == field
    bodies.close()
