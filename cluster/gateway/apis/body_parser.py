"""Parsing of large request bodies in a helper process: values are counted first, then only known fields are parsed.

A JSON decoder splits the top level of the body and skips unknown fields, at about a nanosecond a byte. The values in
each known field are then counted (json_values.py), and the field is parsed by itself. protobuf messages are scanned
before they are decoded (message_scan.py). Prompts are returned as pickles (PackedPrompt) and token ids as arrays. The
gateway process passes both on without unpacking them.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import msgspec
import numpy as np
from google.protobuf.message import Message

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.apis.anthropic import requests as anthropic_requests
from cluster.gateway.apis.grpc import requests as grpc_requests
from cluster.gateway.apis.grpc.packed_ids import packed_ids
from cluster.gateway.apis.json_values import (
    ARGUMENTS,
    BODY,
    MAX_DEPTH,
    MAX_IDS,
    MESSAGES,
    NO_UNICODE,
    PROMPTS,
    check_counts,
    check_utf8,
    parse,
)
from cluster.gateway.apis.openai import pooling_requests
from cluster.gateway.apis.openai import requests as openai_requests
from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.calls.pooling.pooling_request import ParsedPooling, packed
from cluster.gateway.calls.request import (
    MAX_MESSAGES,
    MAX_STOP_TOKEN_IDS,
    ChatPrompt,
    GenerationRequest,
    IdsPrompt,
    PackedPrompt,
    Prompt,
    TextPrompt,
    check_metadata,
    check_options,
)
from cluster.v1 import inference_pb2 as pb
from cluster.wire.message_scan import scan

UNSCANNED_BYTES: Final = 1 << 17
MAX_ELEMENTS: Final = 100_000
"""Upper bound on the fields and list elements in one protobuf message, at all levels of nesting."""
MAX_MEMBERS: Final = 10_000
"""Upper bound on the elements of one top-level field of a message."""
IDS_FIELD: Final[Mapping[type[Message], str]] = {
    pb.CompleteRequest: "prompt_token_ids",
    pb.DetokenizeRequest: "token_ids",
}
"""Names of the fields that hold token ids, keyed by message type."""
MANY_IDS: Final = 4096
IDS_PER_SLICE: Final = 65_536
MAX_ID: Final = 2**31 - 1
MAX_NUMBERS: Final = BODY.values
_KINDS = {b"[": "an array", b'"': "a string", b"n": "null", b"t": "a boolean", b"f": "a boolean"}
_IDS = re.compile(rb"\s*\[\s*-?[0-9]")
_IDS_DECODER = msgspec.json.Decoder(list[int])
_TEXT_DECODER = msgspec.json.Decoder(str)
_MEMBERS_DECODER = msgspec.json.Decoder(list[msgspec.Raw])
MAX_OPTION_BYTES: Final = 1 << 17
"""Upper bound on the bytes of a field that is not a prompt. The longest valid field has 100 KB: stop strings in which
every character is escaped."""
_MAX_BYTES = {
    **dict.fromkeys(("messages", "prompt", "chat_template_kwargs", "functions", "documents", "system"), 1 << 62),
    **dict.fromkeys(pooling_requests.INPUT_FIELDS, 1 << 62),
    **dict.fromkeys(("response_format", "structured_outputs", "tools", "output_config"), 2 << 20),
}
_BOUNDS = {
    "messages": MESSAGES,
    "prompt": PROMPTS,
    "tools": MESSAGES,
    **dict.fromkeys(pooling_requests.INPUT_FIELDS - {"documents"}, BODY),
}
_PLACE = re.compile(r"\$\[(\d+)\]")


def _splitter(names: frozenset[str]) -> msgspec.json.Decoder[Any]:
    raw = msgspec.Raw | msgspec.UnsetType
    body = msgspec.defstruct("Body", [(name, raw, msgspec.UNSET) for name in sorted(names)])
    return msgspec.json.Decoder(body)


class BodyReader:
    """Parser of request bodies. The class Bodies (bodies.py) calls the methods of this parser in helper processes."""

    def __init__(self) -> None:
        self._http = {
            "chat": (_splitter(openai_requests.CHAT_FIELDS), openai_requests.parse_chat),
            "completion": (_splitter(openai_requests.COMPLETION_FIELDS), openai_requests.parse_completion),
            "messages": (_splitter(anthropic_requests.MESSAGES_FIELDS), anthropic_requests.parse_messages),
            "count_tokens": (_splitter(anthropic_requests.COUNT_FIELDS), anthropic_requests.parse_count),
        }
        self._pooling = {
            "embeddings": _splitter(pooling_requests.EMBEDDINGS_FIELDS),
            "rerank": _splitter(pooling_requests.RERANK_FIELDS),
            "score": _splitter(pooling_requests.SCORE_FIELDS),
        }

    def http(self, body: bytes | bytearray, name: str, max_ids: int = MAX_IDS) -> Any:
        """Parse a request body of the HTTP API into a ParsedRequest or a ParsedPooling. Raises CallError, also for a
        prompt of more than `max_ids` token ids."""
        if (pooling_splitter := self._pooling.get(name)) is not None:
            values = {name: _field(name, raw, max_ids) for name, raw in _split(pooling_splitter, body).items()}
            return _packed_pooling(pooling_requests.PARSERS[name](Fields(values)))
        splitter, parse_body = self._http[name]
        parsed = parse_body(Fields({name: _field(name, raw, max_ids) for name, raw in _split(splitter, body).items()}))
        for request in parsed.requests[:1]:  # all requests of a body have the same options
            check_request(request, parsed.names)
        return replace(parsed, requests=[_packed(request) for request in parsed.requests])

    def message(self, data: bytes | bytearray, name: str, max_ids: int = MAX_IDS) -> Any:
        """Parse a request of the gRPC API. Raises CallError, also for a request of more than `max_ids` token ids."""
        call = grpc_requests.READ[name]
        request = _message(call.kind, data, max_ids)
        if call.kind in (pb.ChatRequest, pb.CompleteRequest):  # the options are checked before the large prompt is read
            check_options(grpc_requests.options_of(request))
        parsed = _read_ids(request, data) or call.read(request)
        if isinstance(parsed, GenerationRequest):
            check_request(parsed, {})
        return _packed_all(parsed)

    def session(self, data: bytes | bytearray) -> list[Any]:
        """Parse a message of a session. Returns the requests in the message, in order. Raises CallError."""
        return [_packed_all(item) for item in grpc_requests.session_items(_message(pb.SessionRequest, data))]


def check_request(request: GenerationRequest, names: Mapping[str, str]) -> None:
    """Check the options, the metadata and the model name of a parsed request. Called in the helper process, before the
    prompt is packed and sent to the gateway process. `names`: maps field names of a generation request to names in the
    caller's body, for the errors. Raises CallError."""
    try:
        check_options(request.options)
        check_metadata(request.metadata)
    except CallError as error:
        raise openai_requests.with_caller_names(error, names) from None
    grpc_requests.check_name(request.model)


def _split(splitter: msgspec.json.Decoder[Any], body: bytes | bytearray) -> Mapping[str, bytes]:
    """Return the known fields of a JSON object, each as JSON text. Raises CallError."""
    try:
        check_utf8(body)
        fields_read = splitter.decode(body)
    except UnicodeDecodeError as error:
        raise _no_text(splitter, body, error.start) from None
    except msgspec.ValidationError:
        first = bytes(body[:64]).lstrip()[:1]
        raise invalid("body", f"must be a JSON object, got {_KINDS.get(first, 'a number')}") from None
    except msgspec.DecodeError as error:
        raise invalid("body", f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    except RecursionError:
        raise invalid("body", f"is nested too deeply; at most {MAX_DEPTH} levels") from None
    fields = {name: getattr(fields_read, name) for name in fields_read.__struct_fields__}
    return {name: bytes(raw) for name, raw in fields.items() if raw is not msgspec.UNSET}


def _no_text(splitter: msgspec.json.Decoder[Any], body: bytes | bytearray, at: int) -> CallError:
    """Return the error for a body with bytes that are not UTF-8. The error names the top-level field that holds these
    bytes; if the field cannot be found, the error names the whole body."""
    part = body[at : at + 3]
    why = NO_UNICODE if part[:1] == b"\xed" else f"is not JSON: invalid UTF-8 at byte {at}; send UTF-8"
    try:
        fields_read = splitter.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return invalid("body", why)
    for name in fields_read.__struct_fields__:
        raw = getattr(fields_read, name)
        if raw is not msgspec.UNSET and part in bytes(raw) and not _is_text(bytes(raw)):
            return invalid(name, why)
    return invalid("body", why)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _field(name: str, raw: bytes, max_ids: int) -> Any:
    """Parse the value of a top-level field. A prompt of token ids is returned as an array. Raises CallError."""
    most = _MAX_BYTES.get(name, MAX_OPTION_BYTES)
    if len(raw) > most:
        raise invalid(name, f"is {len(raw)} bytes long; at most {most} are allowed: send less")
    if name != "prompt" or _IDS.match(raw) is None:
        if name == "prompt" and raw[:1] == b'"':
            with suppress(msgspec.DecodeError):  # `parse` reports the error
                return _TEXT_DECODER.decode(raw)
        check_counts(name, raw, _BOUNDS.get(name, ARGUMENTS))
        if name == "messages":
            _count_messages(raw)
        return parse(name, raw, None, MAX_DEPTH - 1)
    check_counts(name, raw, PROMPTS)
    if (count := raw.count(b",") + 1) > max_ids:
        raise _too_many_ids("prompt", count)
    try:
        return _as_array(_IDS_DECODER.decode(raw))
    except msgspec.ValidationError as error:
        place = _PLACE.search(str(error))
        raise invalid(f"prompt[{place[1]}]" if place else "prompt", "must be a whole number") from None
    except (OverflowError, msgspec.DecodeError):
        raise invalid("prompt", "must hold token ids that fit into 32 bits") from None


def _count_messages(raw: bytes) -> None:
    """Raise CallError for a list of too many messages, before any of the messages is parsed."""
    with suppress(msgspec.DecodeError, RecursionError):  # the parser reports a value that is not a list
        count = len(_MEMBERS_DECODER.decode(raw))
        if count > MAX_MESSAGES:
            raise invalid("messages", f"at most {MAX_MESSAGES} messages, got {count}")


def _read_ids(request: Any, data: bytes | bytearray) -> GenerationRequest | grpc_requests.DetokenizeCall | None:
    """Parse a message with many token ids, which are read directly from `data` into an array.

    Returns None if this fast way does not apply: the message has fewer than MANY_IDS ids, its type is not in
    IDS_FIELD, the ids are not packed, or the request is resumable.
    """
    field = IDS_FIELD.get(type(request))
    if field is None or len(getattr(request, field)) < MANY_IDS:
        return None
    ids: Any = packed_ids(data, request.DESCRIPTOR.fields_by_name[field].number)
    if ids is None:
        return None
    if field == "token_ids":
        return grpc_requests.DetokenizeCall(request.model, ids)
    if request.resumable:  # the digest of a resumable request covers the whole message
        return None
    del request.prompt_token_ids[1:]
    parsed = grpc_requests.parse_complete(request)
    return replace(parsed, prompt=IdsPrompt(ids))


def _as_array(ids: list[int]) -> Any:
    """Return token ids as an array. Raises OverflowError for ids that do not fit into 32 bits."""
    packed = np.empty(len(ids), np.int32)
    for at in range(0, len(ids), IDS_PER_SLICE):
        part = ids[at : at + IDS_PER_SLICE]
        try:
            whole = np.frombuffer(array("I", part), np.uint32)  # three times as fast as signed numbers
        except OverflowError:
            packed[at : at + IDS_PER_SLICE] = array("i", part)
        else:
            if whole.max() > MAX_ID:
                raise OverflowError
            packed[at : at + IDS_PER_SLICE] = whole
    return packed


def _too_many_ids(field: str, count: int) -> CallError:
    return CallError(
        Outcome.CONTEXT_LENGTH_EXCEEDED,
        f"{field}: has {count} token ids, more than the context of any model holds: send fewer",
        violations=[Violation(field, "too long")],
    )


def _message(kind: type[Message], data: bytes | bytearray, max_ids: int = MAX_IDS) -> Any:
    """Decode a protobuf message. Raises CallError for an invalid message, and for one with too many fields, elements or
    numbers."""
    if len(data) <= UNSCANNED_BYTES:  # decoding a short message takes no longer than a scan
        return grpc_requests.decoded(kind, data)
    scanned = scan(kind.DESCRIPTOR, data, MAX_ELEMENTS, members=MAX_MEMBERS, count_numbers=True)
    if scanned.field:
        most = f"at most {MAX_ELEMENTS} fields and elements, {MAX_MEMBERS} of one field"
        raise invalid(scanned.field, f"holds too many fields or elements; {most}: send less")
    if kind in IDS_FIELD and scanned.numbers > max_ids + MAX_STOP_TOKEN_IDS:
        raise _too_many_ids(IDS_FIELD[kind], scanned.numbers)
    if scanned.numbers > MAX_NUMBERS:
        raise invalid("request", f"holds {scanned.numbers} numbers; at most {MAX_NUMBERS} are allowed: send less")
    return grpc_requests.decoded(kind, data)


def _packed_pooling(parsed: ParsedPooling) -> ParsedPooling:
    """Check a parsed pooling request, and pack its inputs. Raises CallError."""
    check_metadata(parsed.request.metadata)
    grpc_requests.check_name(parsed.request.model)
    return replace(parsed, request=replace(parsed.request, inputs=packed(parsed.request.inputs)))


def _packed_start(start: grpc_requests.SessionStart) -> grpc_requests.SessionStart:
    if isinstance(start.request, GenerationRequest):
        return replace(start, request=_packed(start.request))
    if isinstance(start.request, ParsedPooling):
        request: ParsedPooling | CallError
        try:
            request = _packed_pooling(start.request)
        except CallError as error:
            request = error
        return replace(start, request=request)
    return start


def _packed(request: GenerationRequest) -> GenerationRequest:
    return replace(request, prompt=_packed_prompt(request.prompt))


def _packed_prompt(prompt: Prompt) -> Prompt:
    if isinstance(prompt, ChatPrompt | TextPrompt):
        return PackedPrompt.of(prompt)
    if isinstance(prompt, IdsPrompt):
        ids = prompt.token_ids
        return IdsPrompt(_as_array(ids) if isinstance(ids, list) else ids)
    return prompt


_PACK: Mapping[type, Callable[[Any], Any]] = {
    GenerationRequest: _packed,
    grpc_requests.ResumedCall: lambda call: replace(call, request=_packed(call.request)),
    grpc_requests.TokenizeCall: lambda call: replace(call, prompt=_packed_prompt(call.prompt)),
    grpc_requests.SessionStart: _packed_start,
    ParsedPooling: _packed_pooling,
}


def _packed_all(value: Any) -> Any:
    pack = _PACK.get(type(value))
    return value if pack is None else pack(value)
