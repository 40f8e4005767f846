"""The order in which a worker applies the parts of a gateway's message, and its answer to a request for the tokenizer
bundle."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

from cluster.api.types import WorkerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.worker.gateway_messages import GatewayMessages
from tests.worker.test_link import make_link

BUNDLE = Bundle({"tokenizer.json": b"{}"})


def messages() -> tuple[GatewayMessages, Mock]:
    """Return GatewayMessages whose collaborators are mocks, and the mock that records their calls in order."""
    parts = Mock()
    for name in ("take_over", "accept", "abort"):
        setattr(parts.submits, name, AsyncMock())
    identity: Any = Mock(spec=WorkerIdentity, bundle_digest=BUNDLE.digest, worker_id="w")
    names = ("credit", "usage", "served", "adapters", "submits", "renders", "drains")
    return GatewayMessages(identity=identity, bundle=BUNDLE, **{name: getattr(parts, name) for name in names}), parts


async def test_each_part_finds_what_it_depends_on() -> None:
    """A worker applies the parts of a gateway's message in a fixed order: adapters, resumes (takeovers), Submits, the
    backlog, aborts, and commands. Credit is granted last."""
    subject, parts = messages()
    link = make_link()
    message = pb.GatewayTurn(
        seq=7,
        grant_ack=3,
        usage_acks=[1],
        adapters=pb.AdapterSet(),
        takeovers=[pb.Takeover(call="c", generation=1)],
        submits=[pb.Submit(slot=1)],
        backlog=pb.Backlog(waiting=1),
        aborts=[2],
        commands=[pb.Command(drain=pb.Drain())],
    )
    await subject.apply(link, message)
    assert [name for name, *_ in parts.mock_calls] == [
        "credit.acknowledge",
        "usage.acked",
        "adapters.receive",
        "submits.take_over",
        "submits.accept",
        "credit.set_backlog",
        "served.forward_backlog",
        "submits.abort",
        "drains.apply",
        "credit.regrant",
        "credit.regrant",
    ]
    assert link.outbox.acked_seq == 7


async def test_an_empty_message_changes_nothing() -> None:
    """A message without content is only acknowledged."""
    subject, parts = messages()
    link = make_link()
    await subject.apply(link, pb.GatewayTurn(seq=1))
    assert parts.mock_calls == []
    assert link.outbox.acked_seq == 1


async def test_the_bundle_is_sent_by_its_digest() -> None:
    """A gateway that requests the digest of the worker's bundle gets the bundle. Another digest is refused."""
    subject, _ = messages()
    link = make_link()
    for digest, has_data in ((BUNDLE.digest, True), ("another", False)):
        await subject.apply(link, pb.GatewayTurn(fetch_bundle=pb.FetchBundle(digest=digest)))
        blob = await asyncio.wait_for(link.blobs.get(), 10)
        assert blob.key == f"bundle:{digest}"
        assert bool(blob.data) is has_data
