"""Tenants over both APIs. A key gives access to the models of the key's tenant, and a suspension ends running calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.api.types import CatalogEntry, ModelState
from cluster.cli.local.gateway_metrics import scrape
from cluster.observe.metrics import Metrics
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.http2.raw import raw_client
from tests.support.calls import chat, complete, refused, rest_of
from tests.support.cluster import sim_engine, until
from tests.support.http import Wire, chat_body, completion_body
from tests.support.keyed import Keyed, bearer, eventually, keyed_cluster, session_end
from tests.support.loop_clock import LoopClock, within

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys, a worker of the model `sim` and a worker of the model `hidden`."""
    declared = "tenants: [{name: fixed, models: [sim]}]\n"
    async with keyed_cluster(tmp_path_factory.mktemp("keyed"), declared) as keyed:
        for model in ("sim", "hidden"):
            engine = sim_engine(checkpoint, decode_ms=2, max_model_len=200_000, kv_blocks=40_000)
            await keyed.cluster.add_worker(engine, bundle, model=model)
        entries = [CatalogEntry(name=n, aliases=(f"{n}-alias",), state=ModelState.READY) for n in ("sim", "hidden")]
        keyed.gateway.directory.apply_catalog(entries)
        yield keyed
        await keyed.cluster.until_idle()


async def test_from_nothing_to_a_call_and_to_its_end(keyed: Keyed) -> None:
    """A key made by `tenants create` and `keys create` works over both APIs. Calls without a key are refused. `tenants
    suspend` ends a gRPC stream, an HTTP stream and a session's call within two seconds. `tenants resume` admits calls
    again."""
    stub = keyed.cluster.stub
    assert (await keyed.cli("tenants", "create", "lab", "--model", "*")).returncode == 0
    key = (await keyed.cli("keys", "create", "lab")).stdout.strip()
    await keyed.until_known("lab", key)
    answer = await stub.Chat(chat(), metadata=bearer(key))
    assert answer.choices[0].message.content
    whole = await keyed.fetch("/v1/chat/completions", chat_body(), key=key)
    assert (whole.status, whole.json["choices"][0]["message"]["content"]) == (
        200,
        answer.choices[0].message.content,
    )
    nobody = await refused(stub.Chat(chat()))
    assert (nobody.code.name, nobody.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED_KEY")
    reply = await keyed.fetch("/v1/chat/completions", chat_body())
    assert (reply.status, reply.error["code"]) == (401, "unauthenticated_key")
    assert reply.headers["www-authenticate"] == "Bearer"

    stream = stub.StreamChat(chat(**LONG), metadata=bearer(key))
    assert await read(stream) is not None
    wire = await Wire.open(keyed.cluster)
    wire.ask("/v1/chat/completions", chat_body(stream=True, **LONG), authorization=f"Bearer {key}")
    assert (await wire.head())[0] == 200
    session = stub.Session(metadata=bearer(key))
    start = pb.SessionStart(call_id=1, chat=chat(**LONG))
    await session.write(pb.SessionRequest(start=start))
    assert await read(session) is not None
    assert (await keyed.cli("tenants", "suspend", "lab", "--reason", "unpaid")).returncode == 0
    async with LoopClock() as clock:
        ended = await refused(rest_of(stream))
        assert (ended.code.name, ended.reason) == ("PERMISSION_DENIED", "TENANT_SUSPENDED")
        assert "suspended" in (await _last_event(wire))["error"]["message"]
        assert await session_end(session, 1) == "TENANT_SUSPENDED"
        again = pb.SessionStart(call_id=2, chat=chat())
        await session.write(pb.SessionRequest(start=again))
        assert await session_end(session, 2) == "TENANT_SUSPENDED"
        refusal = await refused(stub.Chat(chat(), metadata=bearer(key)))
        assert refusal.reason == "TENANT_SUSPENDED"
        assert (await keyed.fetch("/v1/models", key=key)).status == 403
        assert clock.now_s < 2.0
    await keyed.cluster.until_idle()

    assert (await keyed.cli("tenants", "resume", "lab")).returncode == 0
    await keyed.until_known("lab", key)
    assert (await stub.Chat(chat(), metadata=bearer(key))).choices[0].message.content
    await eventually(lambda: _ends(session, 3, ""), "the session is asked again")
    await session.done_writing()
    await wire.close()


async def _ends(session: Any, call_id: int, how: str) -> bool:
    start = pb.SessionStart(call_id=call_id, chat=chat())
    await session.write(pb.SessionRequest(start=start))
    return await session_end(session, call_id) == how


async def _last_event(wire: Wire) -> Any:
    last = b""
    async with asyncio.timeout(60):
        while chunk := await wire.chunk():
            last = chunk
    return json.loads(last.decode().removeprefix("data: ").split("\n\n")[0])


async def test_a_call_that_waits_ends_with_its_tenant(keyed: Keyed, checkpoint: Path, bundle: Bundle) -> None:
    """The suspension of a tenant also ends the tenant's queued calls."""
    key = await keyed.key("waits")
    entry = CatalogEntry(name="away", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=2048)
    keyed.gateway.directory.apply_catalog([*(m.entry for m in keyed.gateway.directory.models), entry])
    waiting = asyncio.create_task(refused(keyed.cluster.stub.Chat(chat(model="away"), metadata=bearer(key))))
    await until(lambda: keyed.gateway.scheduler.queues.waiting("away")[0] == 1, "it waits")
    await keyed.suspend("waits")
    assert (await within(2.0, waiting)).reason == "TENANT_SUSPENDED"
    assert keyed.gateway.scheduler.queues.waiting("away") == (0, 0)
    keyed.gateway.directory.apply_catalog([m.entry for m in keyed.gateway.directory.models if m.name != "away"])


async def test_a_revoked_key_opens_nothing_more(keyed: Keyed) -> None:
    """A revoked key is refused for new calls, also in a session that it opened. The tenant's other key still works."""
    key = await keyed.key("revokes")
    other = await keyed.another_key("revokes")
    session = keyed.cluster.stub.Session(metadata=bearer(key))
    await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=1, chat=chat())))
    assert await session_end(session, 1) == ""
    await asyncio.to_thread(keyed.ledger.keys.revoke, "revokes", key.split("_")[1])
    await within(2.0, eventually(lambda: _ends(session, 2, "UNAUTHENTICATED_KEY"), "the session is refused"))
    assert (await refused(keyed.cluster.stub.Chat(chat(), metadata=bearer(key)))).reason == "UNAUTHENTICATED_KEY"
    assert (await keyed.cluster.stub.Chat(chat(), metadata=bearer(other))).choices
    await session.done_writing()


async def test_a_key_revoked_while_its_request_comes_opens_nothing(keyed: Keyed) -> None:
    """A call whose headers were accepted is refused if the call's key is revoked before the body arrives."""
    key = await keyed.key("slow")
    service, shown = "cluster.v1.Inference", f"Bearer {key}"
    name = pb.GetModelRequest(name="sim").SerializeToString()
    async with raw_client(int(keyed.gateway.endpoints["grpc"].rpartition(":")[2])) as raw, asyncio.timeout(60):
        slow = await raw.call("Chat", None, service=service, authorization=shown)
        later = await raw.call("GetModel", name, service=service, authorization=shown)
        assert (await raw.until_ended(later))["grpc-status"] == "0", "so the head before it was let in"
        await asyncio.to_thread(keyed.ledger.keys.revoke, "slow", key.split("_")[1])
        await eventually(lambda: _unknown(keyed, key), "the gateway knows of it")
        message = chat(max_tokens=2).SerializeToString()
        raw.h2.send_data(slow, b"\x00" + len(message).to_bytes(4, "big") + message, end_stream=True)
        await raw.flush()
        assert (await raw.until_ended(slow))["grpc-status"] == str(grpc.StatusCode.UNAUTHENTICATED.value[0])


async def _unknown(keyed: Keyed, key: str) -> bool:
    """Return whether the key is refused as unknown."""
    try:
        await keyed.cluster.stub.GetModel(pb.GetModelRequest(name="sim"), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


async def test_a_deleted_tenants_calls_end(keyed: Keyed) -> None:
    """The running calls of a deleted tenant end with the error for an unknown key."""
    key = await keyed.key("leaves")
    stream = keyed.cluster.stub.StreamChat(chat(**LONG), metadata=bearer(key))
    assert await read(stream) is not None
    await asyncio.to_thread(keyed.ledger.tenants.delete, "leaves")
    assert (await within(2.0, refused(rest_of(stream)))).reason == "UNAUTHENTICATED_KEY"


async def test_what_the_file_declares_is_there(keyed: Keyed) -> None:
    """The tenants of the configuration file are in the ledger, can have keys, and are read-only."""
    key = await keyed.another_key("fixed")
    await keyed.until_known("fixed", key)
    models = await keyed.cluster.stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
    assert [(m.name, list(m.aliases)) for m in models.models] == [("sim", ["sim-alias"])]
    result = await keyed.cli("tenants", "suspend", "fixed", "--reason", "unpaid")
    assert result.returncode == 1
    assert "declared in a file" in result.stderr


async def test_bounds_of_a_tenant(keyed: Keyed) -> None:
    """The policy of a tenant can limit context and output to less than the model allows."""
    key = await keyed.key("short", max_context_tokens=64, max_output_tokens=7)
    stub = keyed.cluster.stub
    answer = await stub.Chat(chat(max_tokens=50, ignore_eos=True), metadata=bearer(key))
    assert answer.usage.completion_tokens == 7
    reply = await keyed.fetch("/v1/completions", completion_body(max_tokens=50, ignore_eos=True), key=key)
    assert reply.json["usage"]["completion_tokens"] == 7
    long = await refused(
        stub.Complete(pb.CompleteRequest(model="sim", prompt_token_ids=[9] * 64), metadata=bearer(key))
    )
    assert (long.reason, "holds 64" in long.message) == ("CONTEXT_LENGTH_EXCEEDED", True)
    reply = await keyed.fetch("/v1/completions", completion_body([9] * 64), key=key)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


async def test_a_tenants_own_aliases(keyed: Keyed) -> None:
    """An alias of a tenant resolves to its model and is listed, but only for that tenant."""
    key, other = await keyed.key("aliased"), await keyed.key("plain")
    aliases = {"gpt-4o": "sim", "sim-alias": "hidden"}
    await asyncio.to_thread(keyed.ledger.tenants.set_model_aliases, "aliased", aliases)
    stub = keyed.cluster.stub

    async def lists() -> dict[str, list[str]]:
        found = await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
        return {m.name: sorted(m.aliases) for m in found.models}

    wanted = {"sim": ["gpt-4o"], "hidden": ["hidden-alias", "sim-alias"]}

    async def listed() -> bool:
        return await lists() == wanted

    await eventually(listed, "its aliases are listed")
    assert (await stub.Chat(chat(model="gpt-4o"), metadata=bearer(key))).model == "sim"
    assert (await stub.Chat(chat(model="sim-alias"), metadata=bearer(key))).model == "hidden"
    assert (await stub.Chat(chat(model="sim-alias"), metadata=bearer(other))).model == "sim"
    assert (await refused(stub.Chat(chat(model="gpt-4o"), metadata=bearer(other)))).reason == "MODEL_NOT_FOUND"


async def test_health_asks_for_no_key_and_names_no_model(keyed: Keyed) -> None:
    """Health probes over gRPC and HTTP need no key. They reveal no models: the gRPC health service answers NOT_FOUND if
    the requested service is the name of a model."""
    health: Any = health_pb2_grpc.HealthStub(keyed.cluster.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    assert (await refused(health.Check(health_pb2.HealthCheckRequest(service="hidden")))).code.name == "NOT_FOUND"
    assert [(await keyed.fetch(path)).status for path in ("/health", "/ready")] == [200, 200]


async def test_failures_are_counted_and_audited(keyed: Keyed) -> None:
    """Failed authentications are counted by reason. They are audited with the key id that the caller claims, never with
    the key itself."""
    key = await keyed.key("seen")
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    assert (await refused(keyed.cluster.stub.Chat(chat(), metadata=bearer(wrong)))).reason == "UNAUTHENTICATED_KEY"
    found = await asyncio.to_thread(scrape, keyed.gateway.endpoints["metrics"])
    assert found is not None
    failures = {labels["reason"]: v for name, labels, v in found if name == "headrace_auth_failures_total"}
    assert failures["unknown"] >= 1

    async def rows() -> Any:
        return await asyncio.to_thread(keyed.ledger.audit.list, kind="auth_failure", since_s=0.0, limit=1000)

    async def told() -> bool:
        return key.split("_")[1] in {row["actor"] for row in await rows()}

    await eventually(told, "the failure is in the table")
    secret = key.split("_")[2]
    assert secret not in json.dumps(await rows())
    assert secret not in (keyed.file.parent / "gateway" / "audit.jsonl").read_text()


def test_metrics_name_so_many_tenants() -> None:
    """Metrics name only the first `max_tenants` tenants that are counted. All other tenants share one series, so that
    names cannot flood a scraper."""
    metrics = Metrics("c", max_tenants=2)
    for tenant in ("a", "b", "c", "d", "a"):
        metrics.count("prompt_tokens_total", "m", tenant)
    (family,) = [f for f in metrics.collect() if f.name == "headrace_prompt_tokens"]
    assert {s.labels["tenant"]: s.value for s in family.samples} == {"a": 2, "b": 1, "other": 2}


async def test_a_gateway_that_knows_nobody_says_so(tmp_path: Path) -> None:
    """If the database has never answered, callers of both APIs get an error that asks for a retry. Health probes are
    answered."""
    (tmp_path / "ledger.db").mkdir()  # no database can be opened there
    store = f"store: {{database_url: 'sqlite:///{tmp_path / 'ledger.db'}'}}\n"
    async with keyed_cluster(tmp_path / "k", store) as keyed:
        answer = await refused(keyed.cluster.stub.Complete(complete(), metadata=bearer("hr_k_x"), timeout=60))
        assert answer.reason == "STORE_UNAVAILABLE"
        reply = await keyed.fetch("/v1/models", key="hr_k_x")
        assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "store_unavailable", "5")
        assert (await keyed.fetch("/ready")).status == 200
