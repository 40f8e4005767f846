"""Reads large request bodies in a helper process: counts first, then only the fields that are read at all.

A body's top level is split by a JSON reader that skips what it is not asked for, about a nanosecond a byte; each known
field is then counted (json_values.py) and read by itself. Messages of protobuf are scanned (wire_scan.py). Prompts
come out packed (PackedPrompt), token ids as arrays, so that the gateway's process touches none of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import msgspec
import numpy as np
from google.protobuf.message import DecodeError, Message

from cluster.api.outcomes import CallError, invalid
from cluster.gateway import grpc_requests, http_codec
from cluster.gateway.http_fields import Fields
from cluster.gateway.json_values import BODY, MAX_DEPTH, NO_UNICODE, check_counts, kind, parse
from cluster.gateway.wire_scan import scan
from cluster.gateway.wishes import ChatPrompt, IdsPrompt, PackedPrompt, Prompt, TextPrompt, Wish
from cluster.v1 import inference_pb2 as pb

MAX_ELEMENTS: Final = 200_000
"""Fields and members of lists in one protobuf message, at all levels."""
MAX_MEMBERS: Final = 20_000
"""Of one field at the top of a message."""
MAX_NUMBERS: Final = BODY.values
_IDS = re.compile(rb"\s*\[\s*-?[0-9]")
_IDS_DECODER = msgspec.json.Decoder(list[int])
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
            "chat": (_splitter(http_codec.CHAT_FIELDS), http_codec.chat_asked),
            "completion": (_splitter(http_codec.COMPLETION_FIELDS), http_codec.completion_asked),
        }

    def http(self, name: str, body: bytes | bytearray) -> http_codec.Asked:
        """A body of the HTTP API. Raises CallError."""
        splitter, asked = self._http[name]
        found = asked(Fields({name: _field(name, raw) for name, raw in _split(splitter, body).items()}))
        return replace(found, wishes=[_packed(wish) for wish in found.wishes])

    def message(self, name: str, data: bytes | bytearray) -> Any:
        """A request of the gRPC API. Raises CallError."""
        call = grpc_requests.READ[name]
        return _packed_all(call.read(_message(call.kind, bytes(data))))

    def session(self, data: bytes | bytearray) -> list[Any]:
        """A message of a session: its requests in order. Raises CallError."""
        return [_packed_all(one) for one in grpc_requests.session_items(_message(pb.SessionRequest, bytes(data)))]


def _split(splitter: msgspec.json.Decoder[Any], body: bytes | bytearray) -> Mapping[str, bytes]:
    """The known fields of a JSON object, each as its JSON text."""
    try:
        str(body, "utf-8")
        found = splitter.decode(body)
    except UnicodeDecodeError as error:
        raise _no_text(body, error.start) from None
    except msgspec.ValidationError:
        check_counts("", bytes(body), BODY)
        raise invalid("body", f"must be a JSON object, got {kind(parse('', bytes(body), BODY))}") from None
    except msgspec.DecodeError as error:
        raise invalid("body", f"is not JSON: {str(error).removeprefix('JSON is malformed: ')}") from None
    except RecursionError:
        raise invalid("body", f"is nested too deeply; at most {MAX_DEPTH} levels") from None
    fields = {name: getattr(found, name) for name in found.__struct_fields__}
    return {name: bytes(raw) for name, raw in fields.items() if raw is not msgspec.UNSET}


def _no_text(body: bytes | bytearray, at: int) -> CallError:
    """The error of bytes that are no UTF-8; lone surrogates are named by their field, where that is soon found."""
    try:
        parse("", bytes(body), BODY)
    except CallError as error:
        return error
    return invalid("body", f"at byte {at}: {NO_UNICODE}")


def _field(name: str, raw: bytes) -> Any:
    """A field's value. Token ids become an array."""
    if name != "prompt" or _IDS.match(raw) is None:
        return parse(name, raw, BODY, MAX_DEPTH - 1)
    check_counts(name, raw, BODY)
    try:
        return np.array(_IDS_DECODER.decode(raw), np.int32)
    except msgspec.ValidationError as error:
        place = _PLACE.search(str(error))
        raise invalid(f"prompt[{place[1]}]" if place else "prompt", "must be a whole number") from None
    except (OverflowError, msgspec.DecodeError):
        raise invalid("prompt", "must hold token ids that fit into 32 bits") from None


def _message(kind: type[Message], data: bytes) -> Any:
    """A protobuf message that holds no more than it may."""
    found = scan(kind.DESCRIPTOR, data, MAX_ELEMENTS, members=MAX_MEMBERS, count_numbers=True)
    if found.field:
        most = f"at most {MAX_ELEMENTS} fields and members, {MAX_MEMBERS} of one field"
        raise invalid(found.field, f"holds too many fields or members; {most}: send less")
    if found.numbers > MAX_NUMBERS:
        raise invalid("request", f"holds {found.numbers} numbers; at most {MAX_NUMBERS} are taken: send less")
    return decoded(kind, data)


def decoded(kind: type[Message], data: bytes) -> Any:
    """A message. Raises CallError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise invalid("request", f"is not a message of this method: {error}") from None


def _packed(wish: Wish) -> Wish:
    return replace(wish, prompt=_packed_prompt(wish.prompt))


def _packed_prompt(prompt: Prompt) -> Prompt:
    if isinstance(prompt, ChatPrompt | TextPrompt):
        return PackedPrompt.of(prompt)
    if isinstance(prompt, IdsPrompt):
        return IdsPrompt(np.asarray(prompt.token_ids, np.int32))  # type: ignore[arg-type]
    return prompt


_PACK: Mapping[type, Callable[[Any], Any]] = {
    Wish: _packed,
    grpc_requests.ResumedCall: lambda one: replace(one, wish=_packed(one.wish)),
    grpc_requests.TokenizeCall: lambda one: replace(one, prompt=_packed_prompt(one.prompt)),
    grpc_requests.SessionCall: lambda one: replace(one, wish=_packed(one.wish)) if isinstance(one.wish, Wish) else one,
}


def _packed_all(value: Any) -> Any:
    pack = _PACK.get(type(value))
    return value if pack is None else pack(value)
