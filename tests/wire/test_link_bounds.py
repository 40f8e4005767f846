"""Bounds of what gateways receive on the link."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.link_bounds import BOUNDS, MAX_ELEMENTS, MAX_FLOWS, MAX_REPORTS, SMALL_BYTES, check, parser

RECEIVED = [getattr(pb, method.input_type.name) for method in pb.DESCRIPTOR.services_by_name["Link"].methods]


def fields(descriptor: Any, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the message and name of each list, map, text and bytes field below a message."""
    if descriptor.name in seen:
        return
    seen.add(descriptor.name)
    for field in descriptor.fields:
        is_text = field.cpp_type == FieldDescriptor.CPPTYPE_STRING
        if field.is_repeated or is_text:
            yield descriptor.name, field.name
        is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
        if is_map or (field.is_repeated and is_text):
            yield descriptor.name, f"{field.name}[]"
        elif field.message_type is not None:
            yield from fields(field.message_type, seen)


def test_every_field_has_a_bound() -> None:
    """Each list, map, text and bytes field that a gateway can receive on the link has a bound, and no other has."""
    seen: set[str] = set()
    received = {name for kind in RECEIVED for name in fields(kind.DESCRIPTOR, seen)}
    assert received == {(message, name) for message, bounds in BOUNDS.items() for name in bounds}


@pytest.mark.parametrize(
    "message",
    [
        pb.Hello(worker_id="x" * 256),
        pb.Hello(default_sampling_json=" " * 65_537),
        pb.Hello(capabilities=["x"] * 65),
        pb.Hello(capabilities=["x" * 256]),
        pb.Served(flows=[pb.ServedFlow(tenant_handle="x" * 65)]),
        pb.Elsewhere(flows=[pb.FlowBacklog()] * (MAX_FLOWS + 1)),
        pb.WorkerTurn(usage=[pb.Usage()] * (MAX_REPORTS + 1)),
        pb.WorkerBeat(load=pb.Load(busy="x" * 65)),
        pb.ControllerFrame(catalog=pb.Catalog(models=[pb.CatalogModel(card={"x" * 65_537: ""})])),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_beyond_a_bound_is_refused(message: Message) -> None:
    """A message with a list, text or map that is too long is refused with the name of its field."""
    with pytest.raises(ValueError, match=r"^[a-z_]+: "):
        check(message)


@pytest.mark.parametrize("data", [b"\x12\x00" * MAX_ELEMENTS, b"\x22\x00" * (MAX_ELEMENTS + 1), b"\0" * (9 << 20)])
def test_a_large_message_is_counted_before_it_is_decoded(data: bytes) -> None:
    """A message of very many empty elements, which would take far more memory than its bytes, is not decoded."""
    with pytest.raises(ValueError, match=r"at most|more than"):
        parser(pb.WorkerTurn)(data)


@pytest.mark.parametrize("kind", RECEIVED, ids=lambda kind: kind.__name__)
def test_a_usual_message_is_decoded(kind: type[Message]) -> None:
    """A message within the bounds is decoded, small or large."""
    assert parser(kind)(b"") == kind()
    turn = pb.WorkerTurn(usage=[pb.Usage(sealed_record=b"x" * 600, gpu="H100")] * 500)
    assert turn.ByteSize() > SMALL_BYTES
    assert parser(pb.WorkerTurn)(turn.SerializeToString()) == turn
