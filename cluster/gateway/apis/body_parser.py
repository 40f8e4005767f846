"""Reads large request bodies in a helper process: counts first, then only the fields that are read at all.

A body's top level is split by a JSON reader that skips what it is not asked for, about a nanosecond a byte; each known
field is then counted (json_values.py) and read by itself. Messages of protobuf are scanned (message_scan.py). Prompts
come out packed (PackedPrompt), token ids as arrays, so that the gateway's process touches none of it.
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
from cluster.gateway.apis.grpc import requests as grpc_requests
from cluster.gateway.apis.grpc.message_scan import scan
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
from cluster.gateway.apis.openai import requests as openai_requests
from cluster.gateway.apis.openai.fields import Fields
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

UNSCANNED_BYTES: Final = 1 << 17
MAX_ELEMENTS: Final = 100_000
"""Fields and members of lists in one protobuf message, at all levels."""
MAX_MEMBERS: Final = 10_000
"""Of one field at the top of a message."""
IDS_FIELD: Final[Mapping[type[Message], str]] = {
    pb.CompleteRequest: "prompt_token_ids",
    pb.DetokenizeRequest: "token_ids",
}
"""The field that holds a prompt's token ids."""
MANY_IDS: Final = 4096
AT_ONCE_IDS: Final = 65_536
MAX_ID: Final = 2**31 - 1
MAX_NUMBERS: Final = BODY.values
_KINDS = {b"[": "an array", b'"': "a string", b"n": "null", b"t": "a boolean", b"f": "a boolean"}
_IDS = re.compile(rb"\s*\[\s*-?[0-9]")
_IDS_DECODER = msgspec.json.Decoder(list[int])
_TEXT_DECODER = msgspec.json.Decoder(str)
_MEMBERS_DECODER = msgspec.json.Decoder(list[msgspec.Raw])
MAX_OPTION_BYTES: Final = 1 << 17
"""Of a field that is no prompt; the longest good ones, stop strings that are all escapes, have 100 KB."""
_MAX_BYTES = {
    **dict.fromkeys(("messages", "prompt", "chat_template_kwargs", "tools", "functions", "documents"), 1 << 62),
    **dict.fromkeys(("response_format", "structured_outputs"), 2 << 20),
}
_BOUNDS = {"messages": MESSAGES, "prompt": PROMPTS}
_PLACE = re.compile(r"\$\[(\d+)\]")
_BYTE = re.compile(r"\(byte (\d+)\)")


def _splitter(names: frozenset[str]) -> msgspec.json.Decoder[Any]:
    raw = msgspec.Raw | msgspec.UnsetType
    made = msgspec.defstruct("Body", [(name, raw, msgspec.UNSET) for name in sorted(names)])
    return msgspec.json.Decoder(made)


class BodyReader:
    """What the helpers of Bodies serve."""

    def __init__(self) -> None:
        self._http = {
            "chat": (_splitter(openai_requests.CHAT_FIELDS), openai_requests.chat_asked),
            "completion": (_splitter(openai_requests.COMPLETION_FIELDS), openai_requests.completion_asked),
        }

    def http(self, body: bytes | bytearray, name: str, most_ids: int = MAX_IDS) -> openai_requests.ParsedRequest:
        """A body of the HTTP API. A prompt of more than `most_ids` token ids is refused. Raises CallError."""
        splitter, asked = self._http[name]
        found = asked(Fields({name: _field(name, raw, most_ids) for name, raw in _split(splitter, body).items()}))
        for wish in found.wishes[:1]:  # all have the same options
            check_wish(wish, found.names)
        return replace(found, wishes=[_packed(wish) for wish in found.wishes])

    def message(self, data: bytes | bytearray, name: str, most_ids: int = MAX_IDS) -> Any:
        """A request of the gRPC API. `most_ids` as for `http`. Raises CallError."""
        call = grpc_requests.READ[name]
        request = _message(call.kind, data, most_ids)
        if call.kind in (pb.ChatRequest, pb.CompleteRequest):  # before prompts, which are large
            check_options(grpc_requests.options_of(request))
        found = _read_ids(request, data) or call.read(request)
        if isinstance(found, GenerationRequest):
            check_wish(found, {})
        return _packed_all(found)

    def session(self, data: bytes | bytearray) -> list[Any]:
        """A message of a session: its requests in order. Raises CallError."""
        return [_packed_all(one) for one in grpc_requests.session_items(_message(pb.SessionRequest, data))]


def check_wish(wish: GenerationRequest, names: Mapping[str, str]) -> None:
    """Refuse here what the gateway would refuse, so that it does not come back whole. Raises CallError."""
    try:
        check_options(wish.options)
        check_metadata(wish.metadata)
    except CallError as error:
        raise openai_requests.as_asked(error, names) from None
    grpc_requests.check_name(wish.model)


def _split(splitter: msgspec.json.Decoder[Any], body: bytes | bytearray) -> Mapping[str, bytes]:
    """The known fields of a JSON object, each as its JSON text."""
    try:
        check_utf8(body)
        found = splitter.decode(body)
    except UnicodeDecodeError as error:
        raise _no_text(splitter, body, error.start) from None
    except msgspec.ValidationError:
        first = bytes(body[:64]).lstrip()[:1]
        raise invalid("body", f"must be a JSON object, got {_KINDS.get(first, 'a number')}") from None
    except msgspec.DecodeError as error:
        raise invalid("body", f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    except RecursionError:
        raise invalid("body", f"is nested too deeply; at most {MAX_DEPTH} levels") from None
    fields = {name: getattr(found, name) for name in found.__struct_fields__}
    return {name: bytes(raw) for name, raw in fields.items() if raw is not msgspec.UNSET}


def _no_text(splitter: msgspec.json.Decoder[Any], body: bytes | bytearray, at: int) -> CallError:
    """The error of bytes that are no UTF-8, with the top-level field that holds them, if that is a known one."""
    part = body[at : at + 3]
    why = NO_UNICODE if part[:1] == b"\xed" else f"is not JSON: no UTF-8 at byte {at}; send UTF-8"
    try:
        found = splitter.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return invalid("body", why)
    for name in found.__struct_fields__:
        raw = getattr(found, name)
        if raw is not msgspec.UNSET and part in bytes(raw) and not _is_text(bytes(raw)):
            return invalid(name, why)
    return invalid("body", why)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _field(name: str, raw: bytes, most_ids: int) -> Any:
    """A field's value. Token ids become an array."""
    most = _MAX_BYTES.get(name, MAX_OPTION_BYTES)
    if len(raw) > most:
        raise invalid(name, f"is {len(raw)} bytes long; at most {most} are taken: send less")
    if name != "prompt" or _IDS.match(raw) is None:
        if name == "prompt" and raw[:1] == b'"':
            with suppress(msgspec.DecodeError):  # `parse` says what is wrong with it
                return _TEXT_DECODER.decode(raw)
        check_counts(name, raw, _BOUNDS.get(name, ARGUMENTS))
        if name == "messages":
            _count_messages(raw)
        return parse(name, raw, None, MAX_DEPTH - 1)
    check_counts(name, raw, PROMPTS)
    if (count := raw.count(b",") + 1) > most_ids:
        raise _too_many_ids("prompt", count)
    try:
        return _as_array(_IDS_DECODER.decode(raw))
    except msgspec.ValidationError as error:
        place = _PLACE.search(str(error))
        raise invalid(f"prompt[{place[1]}]" if place else "prompt", "must be a whole number") from None
    except (OverflowError, msgspec.DecodeError):
        raise invalid("prompt", "must hold token ids that fit into 32 bits") from None


def _count_messages(raw: bytes) -> None:
    """Refuse too many messages before one is made. Raises CallError."""
    with suppress(msgspec.DecodeError, RecursionError):  # what is no list is refused as what it is
        count = len(_MEMBERS_DECODER.decode(raw))
        if count > MAX_MESSAGES:
            raise invalid("messages", f"at most {MAX_MESSAGES} messages, got {count}")


def _read_ids(request: Any, data: bytes | bytearray) -> GenerationRequest | grpc_requests.DetokenizeCall | None:
    """What is asked by a message of many token ids, which are read from its bytes; None for any other."""
    field = IDS_FIELD.get(type(request))
    if field is None or len(getattr(request, field)) < MANY_IDS:
        return None
    ids: Any = packed_ids(data, request.DESCRIPTOR.fields_by_name[field].number)
    if ids is None:
        return None
    if field == "token_ids":
        return grpc_requests.DetokenizeCall(request.model, ids)
    if request.resumable:  # its digest is of all that it holds
        return None
    del request.prompt_token_ids[1:]
    wish = grpc_requests.complete_wish(request)
    return replace(wish, prompt=IdsPrompt(ids))


def _as_array(ids: list[int]) -> Any:
    """Raises OverflowError for what does not fit into 32 bits."""
    found = np.empty(len(ids), np.int32)
    for at in range(0, len(ids), AT_ONCE_IDS):
        part = ids[at : at + AT_ONCE_IDS]
        try:
            whole = np.frombuffer(array("I", part), np.uint32)  # in a third of the time that signed ones take
        except OverflowError:
            found[at : at + AT_ONCE_IDS] = array("i", part)
        else:
            if whole.max() > MAX_ID:
                raise OverflowError
            found[at : at + AT_ONCE_IDS] = whole
    return found


def _too_many_ids(field: str, count: int) -> CallError:
    return CallError(
        Outcome.CONTEXT_LENGTH_EXCEEDED,
        f"{field}: has {count} token ids, more than the context of any model here holds: send fewer",
        violations=[Violation(field, "too long")],
    )


def _message(kind: type[Message], data: bytes | bytearray, most_ids: int = MAX_IDS) -> Any:
    """A protobuf message that holds no more than it may."""
    if len(data) <= UNSCANNED_BYTES:  # protobuf is done with as little in the time of a scan
        return grpc_requests.decoded(kind, data)
    found = scan(kind.DESCRIPTOR, data, MAX_ELEMENTS, members=MAX_MEMBERS, count_numbers=True)
    if found.field:
        most = f"at most {MAX_ELEMENTS} fields and members, {MAX_MEMBERS} of one field"
        raise invalid(found.field, f"holds too many fields or members; {most}: send less")
    if kind in IDS_FIELD and found.numbers > most_ids + MAX_STOP_TOKEN_IDS:
        raise _too_many_ids(IDS_FIELD[kind], found.numbers)
    if found.numbers > MAX_NUMBERS:
        raise invalid("request", f"holds {found.numbers} numbers; at most {MAX_NUMBERS} are taken: send less")
    return grpc_requests.decoded(kind, data)


def _packed(wish: GenerationRequest) -> GenerationRequest:
    return replace(wish, prompt=_packed_prompt(wish.prompt))


def _packed_prompt(prompt: Prompt) -> Prompt:
    if isinstance(prompt, ChatPrompt | TextPrompt):
        return PackedPrompt.of(prompt)
    if isinstance(prompt, IdsPrompt):
        ids = prompt.token_ids
        return IdsPrompt(_as_array(ids) if isinstance(ids, list) else ids)
    return prompt


_PACK: Mapping[type, Callable[[Any], Any]] = {
    GenerationRequest: _packed,
    grpc_requests.ResumedCall: lambda one: replace(one, wish=_packed(one.wish)),
    grpc_requests.TokenizeCall: lambda one: replace(one, prompt=_packed_prompt(one.prompt)),
    grpc_requests.SessionStart: lambda one: (
        replace(one, wish=_packed(one.wish)) if isinstance(one.wish, GenerationRequest) else one
    ),
}


def _packed_all(value: Any) -> Any:
    pack = _PACK.get(type(value))
    return value if pack is None else pack(value)
