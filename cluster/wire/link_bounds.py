"""Bounds of all that workers and controllers send on the link: the length of each list, map, text and bytes field.

A certificate proves the sender's role and model, not its good will. So a gateway accepts no more than a correct sender
needs. A message beyond a bound is a fault of its sender and ends the sender's stream. A message of at most SMALL_BYTES
bytes is read without counting, since its lists are short enough; the texts in it that the gateway keeps are checked
where they are read (`check`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.codecs.adapter_codec import MAX_ADAPTERS, MAX_SOURCE, MAX_TENANTS
from cluster.wire.codecs.codec import MAX_BUSY, MAX_KV_BLOCKS, MAX_TEXT
from cluster.wire.codecs.fairness_codec import MAX_HANDLE
from cluster.wire.codecs.pooling_codec import FLOAT_BYTES, MAX_SHORTER_DIMENSIONS
from cluster.wire.message_scan import scan
from cluster.wire.operator_state import MAX_BYTES as MAX_STATE_BYTES
from cluster.wire.rendering import PIECE_BYTES

SMALL_BYTES: Final = 65_536
MAX_MESSAGE_BYTES: Final[Mapping[type[Message], int]] = {
    pb.WorkerTurn: 8 << 20,
    pb.Blob: 16 << 20,
    pb.WorkerBeat: 4096,
    pb.StartingWorker: 8192,
    pb.ControllerFrame: 16 << 20,
}
"""Maximum size in bytes of each kind of message that a gateway receives."""
MAX_ELEMENTS: Final = 131_072
"""Maximum number of fields and list elements in a worker's message of more than SMALL_BYTES bytes, at all levels."""
MAX_CATALOG_ELEMENTS: Final = 1 << 20
MAX_NAME: Final = 255
"""Maximum number of characters of a name or id. A usage record has no longer ones."""
MAX_REPORTS: Final = 1000
"""Maximum number of usage reports in a message; workers send at most ended_requests.MAX_PER_MESSAGE."""
MAX_FLOWS: Final = 20_000
"""Maximum number of flows in a message. A worker's first report has all its flows."""
MAX_SLOTS: Final = 131_072
"""Maximum number of entries in a column of step outputs. An outbox with half as many unsent tokens ends its link."""
MAX_DEFAULTS: Final = 65_536
"""Maximum number of characters of a model's sampling defaults, which are JSON."""
MAX_SEALED: Final = 65_536
MAX_WORD: Final = 64
MAX_DETAILS: Final = 16_384
"""Maximum number of slots that have something besides plain tokens in a message."""
MAX_MODELS: Final = 10_000
MAX_LIST: Final = 1024
"""Maximum number of entries in a list of a model's catalog entry."""
MAX_OUTPUT: Final = 1 << 20
"""Maximum number of characters in one text of an answer."""
MAX_FIELD_VIOLATIONS: Final = 1000

BOUNDS: Final[Mapping[str, Mapping[str, int]]] = {
    "WorkerTurn": {"accepted": MAX_DETAILS, "refused": MAX_DETAILS, "usage": MAX_REPORTS, "elsewhere": MAX_LIST}
    | {"rendered": 64, "engine_ended": MAX_TEXT},
    "AdapterReport": {"adapters": MAX_ADAPTERS},
    "AdapterStatus": {"name": MAX_NAME, "digest": MAX_WORD, "reason": MAX_TEXT},
    "KvBlocks": {"stored": 8 * MAX_KV_BLOCKS, "removed": 8 * MAX_KV_BLOCKS},
    "Hello": dict.fromkeys(
        (
            *("worker_id", "incarnation", "ray_cluster", "role", "model", "version", "weight_digest", "bundle_digest"),
            *("engine_class", "engine_path", "node", "engine_version", "generation", "pod", "host", "gpu"),
        ),
        MAX_NAME,
    )
    | {"capabilities": 64, "capabilities[]": MAX_NAME}
    | {"default_sampling_json": MAX_DEFAULTS, "engine_path_reason": MAX_TEXT},
    "Pooler": {"shorter_dimensions": MAX_SHORTER_DIMENSIONS},
    "Refused": {"reason": MAX_NAME, "message": MAX_TEXT, "field": MAX_TEXT},
    "StepOutputs": dict.fromkeys(("slots", "counts", "token_ids", "part_slots", "part_tags", "part_texts"), MAX_SLOTS)
    | dict.fromkeys(("firsts", "finishes", "logprobs", "parts", "vectors", "times"), MAX_DETAILS)
    | {"part_texts[]": MAX_OUTPUT},
    "SlotVector": {"values": FLOAT_BYTES * 65_536},
    "SlotParts": {"parts": MAX_DETAILS, "stop_string": MAX_TEXT},
    "OutputPart": {"text": MAX_OUTPUT},
    "Finish": {"message": MAX_TEXT},
    "SlotLogprobs": {"token_ids": MAX_SLOTS, "logprobs": MAX_SLOTS},
    "Usage": {"sealed_record": MAX_SEALED, "gpu": MAX_NAME, "outcome": MAX_NAME, "idle_id": 2 * MAX_NAME},
    "Load": {"busy": MAX_BUSY},
    "WorkerBeat": {"worker_id": MAX_NAME, "incarnation": MAX_NAME},
    "Elsewhere": {"gateway": MAX_NAME, "flows": MAX_FLOWS},
    "FlowBacklog": {"tenant_handle": MAX_HANDLE},
    "Served": {"flows": MAX_FLOWS},
    "ServedFlow": {"tenant_handle": MAX_HANDLE},
    "Rendered": {"token_ids": PIECE_BYTES, "reason": MAX_NAME, "message": MAX_TEXT, "field": MAX_TEXT},
    "Blob": {"key": MAX_NAME, "data": 8 << 20, "error": MAX_TEXT, "worker_id": MAX_NAME, "incarnation": MAX_NAME},
    "StartingWorker": dict.fromkeys(("worker_id", "model", "pod", "host", "gpu"), MAX_NAME),
    "ControllerHello": {"controller_id": MAX_NAME, "incarnation": MAX_NAME, "verbs": MAX_LIST, "verbs[]": MAX_NAME},
    "AdminReply": {"body": 8 << 20, "outcome": MAX_NAME, "message": MAX_DEFAULTS, "violations": MAX_FIELD_VIOLATIONS},
    "WrongField": {"field": MAX_TEXT, "description": MAX_TEXT},
    "Catalog": {"models": MAX_MODELS, "problems": MAX_LIST},
    "Problem": {"kind": MAX_NAME, "object": MAX_NAME, "cause": MAX_TEXT},
    "OperatorState": {"document": 2 * MAX_STATE_BYTES},
    "CatalogModel": dict.fromkeys(
        ("name", "version", "revision", "state", "bundle_digest", "family", "license", "engine_class"), MAX_NAME
    )
    | dict.fromkeys(("aliases", "weight_digests", "fallback", "versions", "retired", "card", "tasks"), MAX_LIST)
    | dict.fromkeys(("aliases[]", "weight_digests[]", "fallback[]", "retired[]", "tasks[]"), MAX_NAME)
    | {"card[]": MAX_DEFAULTS, "adapters": MAX_ADAPTERS}
    | dict.fromkeys(("state_reason", "default_sampling_json", "sampling_json"), MAX_DEFAULTS),
    "Adapter": {"name": MAX_NAME, "source": MAX_SOURCE, "digest": MAX_WORD, "tenants": MAX_TENANTS}
    | {"tenants[]": MAX_NAME, "license": MAX_NAME, "version": MAX_NAME},
    "VersionShare": dict.fromkeys(("version", "revision", "state", "bundle_digest"), MAX_NAME)
    | {"weight_digests": MAX_LIST, "weight_digests[]": MAX_NAME, "state_reason": MAX_DEFAULTS},
}
"""By message and field, the maximum number of elements of a list or map, of characters of a text and of bytes. The key
`name[]` is for the texts in the list, or for the keys and values in the map, `name`."""

_Checks = list[tuple[str, int, int, Any]]
"""For each bounded field: name, bound, bound of the elements' length (0: none), and the elements' own checks."""
_checks: dict[str, _Checks] = {}


def check(message: Message) -> None:
    """Check a received message against BOUNDS. Raises ValueError that names the field, its length and the bound."""
    _check(message, _checks_of(message.DESCRIPTOR))


def parser(kind: type[Message]) -> Callable[[bytes], Message]:
    """Return the function that a gateway uses to decode messages of type `kind`. It raises ValueError for a message
    that is too large, or that has too many elements."""
    descriptor, decode, most_bytes = kind.DESCRIPTOR, kind.FromString, MAX_MESSAGE_BYTES.get(kind, SMALL_BYTES)

    def parse(data: bytes) -> Message:
        size = len(data)
        if size <= SMALL_BYTES and size <= most_bytes:
            return decode(data)
        if size > most_bytes:
            raise ValueError(f"{descriptor.name}: {size} bytes, at most {most_bytes} are allowed")
        most = MAX_CATALOG_ELEMENTS if kind is pb.ControllerFrame else MAX_ELEMENTS
        scanned = scan(descriptor, data, most)
        if scanned.field:
            raise ValueError(f"{scanned.field}: more than {most} elements in one message")
        message = decode(data)
        check(message)
        return message

    return parse


def _checks_of(descriptor: Any) -> _Checks:
    known = _checks.get(descriptor.full_name)
    if known is None:
        known = _checks[descriptor.full_name] = []
        bounds = BOUNDS.get(descriptor.name, {})
        for field in descriptor.fields:
            nested = field.message_type
            is_map = nested is not None and nested.GetOptions().map_entry
            inner = None if nested is None or is_map else _checks_of(nested)
            if field.is_repeated or field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
                known.append((field.name, bounds[field.name], bounds.get(f"{field.name}[]", 0), inner))
            elif inner:
                known.append((field.name, -1, 0, inner))
    return known


def _check(message: Any, checks: _Checks) -> None:
    for name, most, longest, inner in checks:
        if most < 0:
            if message.HasField(name):
                _check(getattr(message, name), inner)
            continue
        value = getattr(message, name)
        size = len(value)
        if size > most:
            raise ValueError(f"{name}: length {size}, at most {most} is allowed")
        if not size:
            continue
        if longest:
            parts = (*value, *value.values()) if hasattr(value, "values") else value
            if max(map(len, parts)) > longest:
                raise ValueError(f"{name}: an element's length is over {longest}")
        elif inner:
            for element in value:
                _check(element, inner)
