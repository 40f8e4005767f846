"""Aborts and explanations of calls in the other gateway processes of the host. Only a process of the same gateway may
request them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.admin.v1 import admin_pb2 as pb
from cluster.admin.v1 import admin_pb2_grpc, routing_pb2
from cluster.cli.local.ports import choose_ports
from cluster.config.document import parse
from cluster.gateway.apis.admin.siblings import SERVICE, TAG, Siblings
from cluster.gateway.server import Gateway
from cluster.policy.tenants.identity import admin_token
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.wire.tls import TlsFiles
from tests.support.admin import AdminClient
from tests.support.calls import chat as chat_request
from tests.support.calls import refused, rest_of
from tests.support.certificates import Authority
from tests.support.cluster import LOOPBACK, TestCluster, sim_engine
from tests.support.keyed import SECRET, keyed_text

ABORT = "AbortRequest"
LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}


@asynccontextmanager
async def two(folder: Path, text: str) -> AsyncIterator[list[TestCluster]]:
    """Start the two processes of one gateway. Both run inside the test's own process."""
    config = choose_ports(parse(text.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  processes: 2")))
    async with AsyncExitStack() as stack:
        clusters = []
        for process in range(2):
            gateway = Gateway(config, folder / str(process), process=process)
            await gateway.start()
            stack.push_async_callback(gateway.stop, 0)
            cluster = TestCluster(gateway)
            stack.push_async_callback(cluster.channel.close)
            clusters.append(cluster)
        yield clusters


def tls_text(folder: Path) -> tuple[str, TlsFiles]:
    """Return link settings with mutual TLS, and the certificate files."""
    files = Authority(folder).issue("link.example.com")
    tls = f"{{cert_file: {files.cert_file}, key_file: {files.key_file}, ca_file: {files.ca_file}}}"
    return f"gateway:\n  link_tls: {tls}\n", files


@pytest.mark.parametrize("tls", [False, True])
async def test_whichever_process_has_it(tmp_path: Path, checkpoint: Path, bundle: Bundle, tls: bool) -> None:
    """A gateway has two processes. An admin request to the first process can explain and abort a call that runs in
    either process, with and without mutual TLS. If the other process is gone, the errors say that a process did not
    answer."""
    text, files = LOOPBACK, None
    if tls:
        head, files = tls_text(tmp_path / "tls")
        text = text.replace("gateway:\n", head)
    async with two(tmp_path, text) as clusters:
        for cluster in clusters:
            engine = sim_engine(checkpoint, decode_ms=2, max_model_len=200_000, kv_blocks=40_000)
            await cluster.add_worker(engine, bundle, tls=files)
        async with AdminClient(clusters[0].gateway.endpoints["admin"]) as admin:
            ended: set[int] = set()
            for number in range(64):
                async with grpc.aio.insecure_channel(
                    clusters[0].gateway.endpoints["grpc"], options=(("grpc.use_local_subchannel_pool", 1),)
                ) as channel:
                    stub = type(clusters[0].stub)(channel)
                    stream = stub.StreamChat(chat_request(**LONG), metadata=(("x-request-id", f"r{number}"),))
                    assert await read(stream) is not None
                    (at,) = [i for i, cluster in enumerate(clusters) if cluster.gateway.service.statistics()]
                    wanted = routing_pb2.ExplainRequestRequest(request_id=f"r{number}")
                    (explained,) = (await admin.ask("Fleet.ExplainRequest", wanted)).calls
                    assert explained.gateway == clusters[at].gateway.hub.gateway_id
                    assert explained.routes[0].worker in {
                        link.identity.worker_id for link in clusters[at].gateway.hub.links
                    }
                    answer = await admin.ask(
                        "Fleet.AbortRequest", pb.AbortRequestRequest(request_id=f"r{number}", reason="x")
                    )
                    assert (answer.aborted, list(answer.tenants)) == (1, ["default"])
                    assert (await refused(rest_of(stream))).reason == "CANCELLED"
                    ended.add(at)
                if ended == {0, 1}:
                    break
            assert ended == {0, 1}, "all connections at one of two would be a chance of 1 in 2^63"
            for cluster in clusters:
                for worker in cluster.workers:
                    await worker.stop()
            none = pb.AbortRequestRequest(request_id="none", reason="x")
            assert "did not answer" not in (await admin.refused("Fleet.AbortRequest", none)).message
            await clusters[1].gateway.stop(0)
            assert "1 of its processes did not answer" in (await admin.refused("Fleet.AbortRequest", none)).message
            unknown = routing_pb2.ExplainRequestRequest(request_id="none")
            assert "1 of its processes did not answer" in (await admin.refused("Fleet.ExplainRequest", unknown)).message


async def test_nobody_else_may_ask(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If `auth` is set, a link port accepts an abort request only with a valid authentication tag. A request is refused
    if it has no tag, a wrong tag, an operator's token instead of a tag, the tag of another request, or a tag that is an
    hour old."""
    async with two(tmp_path, keyed_text(tmp_path)) as clusters:
        gateway = clusters[1].gateway
        request = pb.AbortRequestRequest(request_id="r")

        def caller(secret: str = SECRET, late_s: float = 0.0) -> Siblings:
            return Siblings(gateway.config.gateway, 0, [secret.encode()], {}, lambda: time.time() - late_s)

        other = pb.AbortRequestRequest(request_id="q")
        tags: dict[str, Any] = {
            "none": (),
            "empty": ((TAG, b""),),
            "a stranger's": ((TAG, caller("t" * 32)._tag(ABORT, request)),),
            "of another request": ((TAG, caller()._tag(ABORT, other)),),
            "of another method": ((TAG, caller()._tag("ExplainRequest", request)),),
            "of an hour ago": ((TAG, caller(late_s=3600)._tag(ABORT, request)),),
            "twice": ((TAG, caller()._tag(ABORT, request)), (TAG, caller()._tag(ABORT, request))),
            "an operator's": (("authorization", f"Bearer {admin_token(SECRET.encode())}"),),
        }
        async with grpc.aio.insecure_channel(gateway.endpoints["link"]) as channel:
            stub = admin_pb2_grpc.FleetStub(channel)
            for what, metadata in tags.items():
                answer = await refused(stub.AbortRequest(request, metadata=metadata))
                assert answer.code.name == "PERMISSION_DENIED", what
            assert (await stub.AbortRequest(request, metadata=((TAG, caller()._tag(ABORT, request)),))).aborted == 0
            explain = await refused(stub.ExplainRequest(routing_pb2.ExplainRequestRequest(request_id="r")))
            assert explain.code.name == "PERMISSION_DENIED"
            listing = await refused(stub.ListWorkers(pb.ListWorkersRequest()))
            assert listing.code.name == "UNIMPLEMENTED", f"a link port has two methods of {SERVICE} only"
        (answer,), unanswered = await caller().ask(ABORT, request)
        assert (list(answer.tenants), unanswered) == ([], 0)
