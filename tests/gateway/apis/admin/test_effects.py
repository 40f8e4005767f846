"""Admin requests that affect other gateways and running calls. Also the admin API without `auth`, with TLS, and while
the database does not answer."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.admin.v1 import admin_pb2, tenants_pb2, usage_pb2
from cluster.ledger.database.connect import CONNECT_TIMEOUT_S
from cluster.policy.tenants.identity import admin_token
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat, refused, rest_of
from tests.support.certificates import Authority
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.http import Wire, chat_body
from tests.support.keyed import SECRET, Keyed, bearer, eventually, keyed_cluster, keyed_text, session_end
from tests.support.loop_clock import LoopClock, within

LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}


@asynccontextmanager
async def operator_of(keyed: Keyed) -> AsyncIterator[AdminClient]:
    """Yield the client of an operator, once the gateway knows the operator's key."""
    key = await role_key(keyed.ledger, "ops", "operator")
    async with AdminClient(keyed.gateway.endpoints["admin"], key) as client:
        await until_known(client, "Catalog.List", admin_pb2.ListRequest())
        yield client


async def add_worker(cluster: TestCluster, checkpoint: Path, bundle: Bundle, **more: Any) -> None:
    """Start a worker that can generate long answers."""
    engine = sim_engine(checkpoint, decode_ms=2, max_model_len=200_000, kv_blocks=40_000, **more)
    await cluster.add_worker(engine, bundle)


@pytest.mark.slow
async def test_two_gateways_know_within_two_seconds(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Changes at one gateway apply at the other gateway within two seconds. The changes: a tenant and a key are
    created, the tenant is suspended and resumed, and the key is revoked. The suspension ends running calls at both
    gateways."""
    text = keyed_text(tmp_path)
    async with (
        keyed_cluster(tmp_path) as keyed,
        running_cluster(tmp_path / "other", text) as other,
        operator_of(keyed) as operator,
    ):
        clusters = (keyed.cluster, other)
        for cluster in clusters:
            await add_worker(cluster, checkpoint, bundle)
        tenant = tenants_pb2.Tenant(name="tenants/lab", models=["*"])
        await operator.ask("Tenants.Create", tenants_pb2.CreateTenantRequest(tenant=tenant))
        made = await operator.ask("Keys.Create", tenants_pb2.CreateKeyRequest(parent="tenants/lab"))
        key = made.secret

        async def outcome(cluster: TestCluster) -> str:
            try:
                await cluster.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        async def soon(code: str) -> None:
            for cluster in clusters:
                await within(2.0, eventually(lambda c=cluster: answers_with(c, code), f"{code} at each gateway"))  # type: ignore[misc]

        async def answers_with(cluster: TestCluster, code: str) -> bool:
            return await outcome(cluster) == code

        await soon("OK")
        streams = [cluster.stub.StreamChat(chat(**LONG), metadata=bearer(key)) for cluster in clusters]
        for stream in streams:
            assert await read(stream) is not None
        suspend = tenants_pb2.SuspendTenantRequest(name="tenants/lab", reason="unpaid")
        assert (await operator.ask("Tenants.Suspend", suspend)).suspended
        async with LoopClock() as clock:
            ends = [await refused(rest_of(stream)) for stream in streams]
            assert clock.now_s < 2.0
        assert [event.reason for event in ends] == ["TENANT_SUSPENDED"] * 2
        await soon("PERMISSION_DENIED")
        await operator.ask("Tenants.Resume", tenants_pb2.ResumeTenantRequest(name="tenants/lab"))
        await soon("OK")
        await operator.ask("Keys.Revoke", tenants_pb2.RevokeKeyRequest(name=made.key.name, reason="lost"))
        await soon("UNAUTHENTICATED")
        for cluster in clusters:
            await cluster.until_idle()


@pytest.mark.slow
async def test_an_aborted_call_frees_its_place(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that is aborted by its request id ends with CANCELLED and frees the engine's only slot for the next call.
    This holds over gRPC, over HTTP and in a session, for running and for waiting calls. Other calls continue."""
    async with keyed_cluster(tmp_path) as keyed, operator_of(keyed) as operator:
        cluster = keyed.cluster
        await add_worker(cluster, checkpoint, bundle, max_num_seqs=1)
        keys = [await keyed.key(name, models=["*"]) for name in ("acme", "rival")]

        def begin(who: int, request_id: str) -> Any:
            metadata = (*bearer(keys[who]), ("x-request-id", request_id))
            return cluster.stub.StreamChat(chat(**LONG), metadata=metadata)

        async def abort(request_id: str, tenant: str = "") -> int:
            parent = f"tenants/{tenant}" if tenant else ""
            request = admin_pb2.AbortRequestRequest(request_id=request_id, parent=parent, reason="runs away")
            return int((await operator.ask("Fleet.AbortRequest", request)).aborted)

        running = begin(0, "same")
        first = await read(running)
        assert first is not None
        waiting = begin(1, "same")
        engine = cluster.workers[0].engine
        line = cluster.gateway.scheduler.queues.waiting
        await until(
            lambda: line("sim")[0] + engine.load().waiting == 1, "the second waits, at the gateway or in the engine"
        )
        assert await abort("same", "rival") == 1
        ended = await refused(waiting)
        assert (ended.code.name, ended.reason) == ("CANCELLED", "CANCELLED")
        assert await read(running) is not None
        assert await abort(first.id) == 1
        assert (await refused(rest_of(running))).reason == "CANCELLED"
        assert (await cluster.stub.Chat(chat(), metadata=bearer(keys[1]), timeout=60)).choices

        wire = await Wire.open(cluster)
        wire.ask(
            "/v1/chat/completions",
            chat_body(stream=True, **LONG),
            authorization=f"Bearer {keys[0]}",
            x_request_id="http-1",
        )
        assert (await wire.head())[0] == 200
        await eventually(lambda: _aborted(operator, "http-1"), "the HTTP call is ended")
        await wire.close()

        session = cluster.stub.Session(metadata=bearer(keys[0]))
        start = pb.SessionStart(call_id=1, chat=chat(**LONG), request_id="session-1")
        await session.write(pb.SessionRequest(start=start))
        assert await read(session) is not None
        assert await abort("session-1") == 1
        assert await session_end(session, 1) == "CANCELLED"
        await session.done_writing()
        await cluster.until_idle()

        answer = await operator.refused(
            "Fleet.AbortRequest", admin_pb2.AbortRequestRequest(request_id="same", reason="x")
        )
        assert (answer.code.name, "on this gateway" in answer.message) == ("NOT_FOUND", True)
        events = await asyncio.to_thread(_flushed, keyed)
        found = [(event["object"], event["tenant"], event["outcome"], event["reason"]) for event in events]
        assert ("same", "rival", "ok", "runs away") in found
        assert ("same", "", "not_found", "x") in found


async def _aborted(operator: AdminClient, request_id: str) -> bool:
    request = admin_pb2.AbortRequestRequest(request_id=request_id, reason="x")
    return await operator.code("Fleet.AbortRequest", request) == "OK"


def _flushed(keyed: Keyed) -> list[dict[str, Any]]:
    keyed.door.audit.flush()
    return keyed.ledger.audit.list(equal={"action": "fleet.abort"})


async def test_without_auth_who_reaches_it_rules(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Without `auth`, a caller needs no key to list the fleet and abort calls. Tenant methods fail, and the error says
    that there are no tenants."""
    await add_worker(cluster, checkpoint, bundle)
    stream = cluster.stub.StreamChat(chat(**LONG), metadata=(("x-request-id", "mine"),))
    assert await read(stream) is not None
    async with AdminClient(cluster.gateway.endpoints["admin"]) as client:
        assert (await client.ask("Fleet.ListWorkers", admin_pb2.ListWorkersRequest())).workers
        request = admin_pb2.AbortRequestRequest(request_id="mine", reason="x")
        assert (await client.ask("Fleet.AbortRequest", request)).aborted == 1
        assert (await refused(rest_of(stream))).reason == "CANCELLED"
        for verb, asked in (
            ("Tenants.List", tenants_pb2.ListTenantsRequest()),
            ("Keys.List", tenants_pb2.ListKeysRequest(parent="tenants/a")),
            ("Usage.Export", usage_pb2.ExportUsageRequest()),
            ("Audit.List", usage_pb2.ListAuditRequest()),
        ):
            answer = await client.refused(verb, asked)
            assert (answer.code.name, answer.reason) == ("UNIMPLEMENTED", "UNSUPPORTED_FEATURE")
            assert "set auth" in answer.message
    await cluster.until_idle()


async def test_tls_and_certificates_on_the_admin_port(tmp_path: Path) -> None:
    """If gateway.tls is set, the admin port accepts TLS only. The holder of a certificate with a role is an operator.
    The holder of a certificate without a role is a caller. Reflection lists the services for every client."""
    authority, callers = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    files = authority.issue("gateway.example.com")
    shown = {name: callers.issue(f"{name}.example.com") for name in ("ops", "plain")}
    tls = (
        f"  tls: {{cert_file: {files.cert_file}, key_file: {files.key_file}, client_ca_file: {shown['ops'].ca_file}}}\n"
    )
    auth = (
        f"auth: {{cluster_secret_file: {tmp_path / 'secret'}, api_keys: {{pepper_file: {tmp_path / 'pepper'}}}, "
        "client_certificates: [{san: ops.example.com, tenant: ops, role: operator}, "
        "{san: plain.example.com, tenant: ops}]}\n"
        "tenants: [{name: ops}]\n"
    )
    request = tenants_pb2.ListTenantsRequest()
    async with keyed_cluster(tmp_path, auth, tls) as keyed:
        address = f"localhost:{keyed.gateway.endpoints['admin'].rsplit(':', 1)[1]}"
        roots = files.ca_file.read_bytes()
        for name, code in (("ops", "OK"), ("plain", "PERMISSION_DENIED"), ("", "UNAUTHENTICATED")):
            own = (shown[name].key_file.read_bytes(), shown[name].cert_file.read_bytes()) if name else (None, None)
            async with AdminClient(address, tls=grpc.ssl_channel_credentials(roots, *own)) as client:
                assert await client.code("Tenants.List", request) == code
        async with AdminClient(address) as plain:
            assert (await plain.refused("Tenants.List", request, 5)).code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@pytest.mark.slow
async def test_the_database_away(tmp_path: Path) -> None:
    """While the database refuses connections or does not answer, methods that need the database fail with UNAVAILABLE.
    The error holds a retry delay but not the address of the database. Other methods work, the event loop does not
    stall, and the failed change is written to the audit file."""
    tenant = tenants_pb2.Tenant(name="tenants/late")
    verbs: tuple[tuple[str, Any], ...] = (
        ("Tenants.List", tenants_pb2.ListTenantsRequest()),
        ("Tenants.Create", tenants_pb2.CreateTenantRequest(tenant=tenant, reason="in vain")),
        ("Usage.Query", usage_pb2.QueryUsageRequest()),
        ("Audit.List", usage_pb2.ListAuditRequest()),
    )
    with socket.socket() as database:
        database.bind(("127.0.0.1", 0))  # not listening yet: connections are refused
        port = database.getsockname()[1]
        text = keyed_text(tmp_path, f"store: {{database_url: 'postgresql+psycopg://u@127.0.0.1:{port}/d'}}\n")
        async with running_cluster(tmp_path / "gateway", text) as cluster:
            async with AdminClient(cluster.gateway.endpoints["admin"], "hr_k1_" + "x" * 43) as stranger:
                assert (await stranger.refused(*verbs[0])).reason == "STORE_UNAVAILABLE"
            async with AdminClient(cluster.gateway.endpoints["admin"], admin_token(SECRET.encode())) as operator:
                await _all_unavailable(operator, verbs, port)
                database.listen(64)  # accepts connections and never answers
                standing_s, whole_s = await _longest_pause(_all_unavailable(operator, verbs, port))
                assert whole_s >= CONNECT_TIMEOUT_S, "each verb waits for the database until the time limit"
                assert standing_s < CONNECT_TIMEOUT_S / 2, "the event loop stalled"
                assert await operator.code("Fleet.ListWorkers", admin_pb2.ListWorkersRequest()) == "OK"
    assert "in vain" in _audit_file(tmp_path)


def _audit_file(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("audit.jsonl"))


async def _all_unavailable(operator: AdminClient, verbs: Sequence[tuple[str, Any]], port: int) -> None:
    for answer in await asyncio.gather(*(operator.refused(*verb) for verb in verbs)):
        assert (answer.code.name, answer.reason) == ("UNAVAILABLE", "STORE_UNAVAILABLE"), answer
        assert answer.retry_s
        assert str(port) not in answer.message


async def _longest_pause(work: Coroutine[Any, Any, None]) -> tuple[float, float]:
    """Return the longest pause of the event loop during the work, and the duration of the work. Both are in seconds."""
    began, task, longest_s = time.monotonic(), asyncio.create_task(work), 0.0
    while not task.done():
        before = time.monotonic()
        await asyncio.sleep(0.01)
        longest_s = max(longest_s, time.monotonic() - before - 0.01)
    await task
    return longest_s, time.monotonic() - began
