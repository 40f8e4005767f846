"""Fairness and limits in a real gateway over real links: the order of calls, refusals, and the settlement of every
reservation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from structlog.testing import capture_logs

from cluster.api.types import WorkerIdentity
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.worker.session import WorkerSession
from tests.support.calls import Answer, chat, complete, refused, rest_of
from tests.support.cluster import running_cluster, sim_engine, until
from tests.support.http import chat_body, fetch
from tests.support.keyed import Keyed, bearer, keyed_cluster

pytestmark = pytest.mark.slow


async def end_of(keyed: Keyed, key: str, **fields: Any) -> str:
    """Return OK, or the reason for which a call was refused."""
    try:
        await keyed.cluster.stub.Complete(complete(**fields), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return Answer(error).reason
    return "OK"


def open_charges(keyed: Keyed) -> int:
    """Return the number of calls whose service account is open."""
    return keyed.gateway.scheduler.charges.fair.order("sim").statistics().open_charges


async def test_a_flood_does_not_hold_up_a_quiet_tenant(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that is queued behind a hundred calls of another tenant runs as soon as a slot is free."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=2, max_num_seqs=4), bundle)
        loud, quiet = await keyed.key("loud"), await keyed.key("quiet")
        ended: list[int] = []

        async def one(number: int) -> None:
            await end_of(keyed, loud, ignore_eos=True, max_tokens=20)
            ended.append(number)

        flood = [asyncio.create_task(one(number)) for number in range(100)]
        await until(lambda: keyed.gateway.scheduler.queues.waiting("sim")[0] > 80, "the flood waits")
        before = len(ended)
        assert await end_of(keyed, quiet, ignore_eos=True, max_tokens=20) == "OK"
        assert len(ended) - before <= 20, "in line it would have been some ninety"
        await asyncio.gather(*flood)
        await keyed.cluster.until_idle()
        assert open_charges(keyed) == 0


async def test_a_full_room_sheds_the_lower_class(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If the queue is full, a new call of a higher class takes the place of a waiting call of a lower class. The
    displaced call ends with SHED."""
    async with keyed_cluster(tmp_path, gateway="  queue: {max_requests: 2}\n") as keyed:
        worker = sim_engine(checkpoint, decode_ms=5, max_num_seqs=1)
        await keyed.cluster.add_worker(worker, bundle)
        low, high = await keyed.key("low", **{"class": "batch"}), await keyed.key("high", **{"class": "interactive"})
        fields = {"ignore_eos": True, "max_tokens": 60}
        calls = []
        while keyed.gateway.scheduler.queues.waiting("sim")[0] < 2:
            calls.append(asyncio.create_task(end_of(keyed, low, **fields)))
            await asyncio.sleep(0.02)
        assert await end_of(keyed, low, **fields) == "QUEUE_FULL"
        assert await end_of(keyed, high, **fields) == "OK"
        reasons = await asyncio.gather(*calls)
        assert sorted(set(reasons)) == ["OK", "SHED"]
        assert reasons.count("SHED") == 1


async def test_never_more_than_the_limit(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Of many concurrent calls over both APIs, the gateway admits as many as the limit allows. The error of each
    refused call names the limit and the time to retry. The log has one line for each call."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        key = await keyed.key("few", limits={"requests_per_minute": 7})
        with capture_logs() as logs:
            reasons = await asyncio.gather(*(end_of(keyed, key, max_tokens=3) for _ in range(20)))
            await keyed.cluster.until_idle()
        assert sorted(reasons) == ["OK"] * 7 + ["RATE_LIMITED"] * 13
        lines = [line for line in logs if line["event"] == "call.ended" and line["tenant"] == "few"]
        assert sorted(line["outcome"] for line in lines) == ["ok"] * 7 + ["rate_limited"] * 13
        answer = await refused(keyed.cluster.stub.Complete(complete(), metadata=bearer(key)))
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert answer.retry_s is not None
        assert 0 < answer.retry_s <= 62
        trailers = answer.trailers
        assert int(trailers["grpc-retry-pushback-ms"]) == pytest.approx(answer.retry_s * 1000, abs=2)
        assert (trailers["x-ratelimit-limit-requests"], trailers["x-ratelimit-remaining-requests"]) == ("7", "0")
        raw = trailers["grpc-status-details-bin"]
        assert isinstance(raw, bytes)
        quota = error_details_pb2.QuotaFailure()
        assert any(part.Unpack(quota) for part in status_pb2.Status.FromString(raw).details)
        assert [v.subject for v in quota.violations] == ["requests_per_minute"]
        reply = await keyed.fetch("/v1/chat/completions", chat_body(), key=key)
        assert (reply.status, reply.error["code"], reply.error["type"]) == (429, "rate_limited", "rate_limit_error")
        assert 0 < int(reply.headers["retry-after"]) <= 62
        assert reply.headers["x-ratelimit-remaining-requests"] == "0"
        assert reply.headers["x-ratelimit-reset-requests"].endswith("s")


async def test_a_call_larger_than_its_limit_is_not_to_be_repeated(
    tmp_path: Path, checkpoint: Path, bundle: Bundle
) -> None:
    """A call that can never fit into its limit gets no retry time. A header tells clients not to retry."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        key = await keyed.key("tiny", limits={"tokens_per_minute": 5})
        answer = await refused(keyed.cluster.stub.Complete(complete(), metadata=bearer(key)))
        assert (answer.reason, answer.retry_s) == ("RATE_LIMITED", None)
        assert answer.trailers["grpc-retry-pushback-ms"] == "-1"
        reply = await keyed.fetch("/v1/chat/completions", chat_body(), key=key)
        assert (reply.status, reply.headers["x-should-retry"]) == (429, "false")
        assert "retry-after" not in reply.headers


async def test_nothing_leaks(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """However a call ends, its reservation is settled and only the used tokens stay counted. The tested calls have
    several outputs, are cancelled, miss their deadline, or lose their worker."""
    async with keyed_cluster(tmp_path, gateway="  resume: {max_wait_s: 0.3}\n") as keyed:
        worker = await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=20), bundle)
        key = await keyed.key("some", limits={"tokens_per_minute": 10_000, "concurrent_requests": 2})
        stub, identity = keyed.cluster.stub, bearer(key)
        whole = await stub.Chat(chat(n=3, max_tokens=4, ignore_eos=True), metadata=identity)
        used = whole.usage.prompt_tokens + 12
        endless = chat(max_tokens=100, ignore_eos=True)
        for _ in range(3):
            stream = stub.StreamChat(endless, metadata=identity)
            await stream.read()
            stream.cancel()
            await keyed.cluster.until_idle()
        late = await refused(stub.Chat(endless, metadata=identity, timeout=0.1))
        assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await keyed.cluster.until_idle()
        running = [stub.StreamChat(endless, metadata=identity) for _ in range(2)]
        for stream in running:
            await stream.read()
        third = await refused(stub.Chat(endless, metadata=identity))
        assert third.reason == "RATE_LIMITED"
        await worker.stop()
        for stream in running:
            with pytest.raises(grpc.aio.AioRpcError):
                await rest_of(stream)
        await until(lambda: keyed.gateway.reservations.open_count == 0, "every reservation is settled")
        assert open_charges(keyed) == 0
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        reply = await keyed.fetch("/v1/chat/completions", chat_body(max_tokens=4, ignore_eos=True), key=key)
        assert reply.status == 200
        prompts = 7 * whole.usage.prompt_tokens  # of this call and the calls above, all of which an engine computed
        remaining = int(reply.headers["x-ratelimit-remaining-tokens"])
        assert used <= 10_000 - remaining - prompts <= used + 6 * 100, "no more than what came, and its own four"


async def test_a_spent_budget_ends_a_running_call(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A running call of a tenant with `on_budget: stop` ends with finish reason "length" once the budget is spent. It
    exceeds the budget by less than the number of tokens that is reserved at once (the quantum). The next call is
    refused."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=2, max_model_len=4000), bundle)
        key = await keyed.key("poor", limits={"daily_tokens": 400}, on_budget="stop")
        stream = keyed.cluster.stub.StreamComplete(complete(max_tokens=3000, ignore_eos=True), metadata=bearer(key))
        chunks = [chunk async for chunk in stream]
        usage = chunks[-1].usage
        assert chunks[-1].choices[0].finish_reason == "length"
        assert 400 - 128 <= usage.total_tokens < 400 + 256
        await keyed.cluster.until_idle()
        reply = await keyed.fetch("/v1/chat/completions", chat_body(), key=key)
        assert (reply.status, reply.error["code"]) == (429, "budget_exhausted")


async def test_gateways_share_their_tenants_accounts(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Two gateways share a worker. The worker reports to each gateway how much service the calls of the other gateway
    got, and whether calls wait at the other gateway."""
    async with running_cluster(tmp_path / "a") as a, running_cluster(tmp_path / "b") as b:
        engine = sim_engine(checkpoint, decode_ms=5, max_num_seqs=2)
        end = WorkerSession(
            identity=WorkerIdentity("both", "1", "sim", bundle_digest=bundle.digest),
            engine=engine,
            info=await engine.start(),
            bundle=bundle,
            gateways=[a.gateway.endpoints["link"], b.gateway.endpoints["link"]],
        )
        task = asyncio.create_task(end.run())
        try:
            await until(lambda: all(c.gateway.hub.links for c in (a, b)), "the worker is linked to both")
            mine, others = (c.gateway.scheduler.charges.fair.order("sim") for c in (a, b))
            calls = [
                asyncio.ensure_future(a.stub.Complete(complete(max_tokens=40, ignore_eos=True))) for _ in range(12)
            ]
            await until(lambda: others.statistics().backlogged == 1, "b has heard that calls wait at a")
            await asyncio.gather(*calls)
            await until(
                lambda: mine.counter("default", 1) == pytest.approx(others.counter("default", 1)) != 0,
                "the accounts agree",
            )
            prompt = (await a.stub.Complete(complete(max_tokens=1))).usage.prompt_tokens
            assert mine.counter("default", 1) <= 13 * prompt + 12 * 80 + 2
            await until(lambda: others.statistics().backlogged == 0, "b has heard that nobody waits any more")
        finally:
            await end.close()
            await asyncio.gather(task, return_exceptions=True)


async def test_every_try_counts(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Every attempted call counts as a request against the tenant's limit, even an invalid one, because its body must
    be read. For the same reason, Tokenize and Detokenize count."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint), bundle)
        stub = keyed.cluster.stub
        tries: dict[str, Callable[[str], Awaitable[Any]]] = {
            "wrong over gRPC": lambda key: refused(stub.Chat(chat(temperature=9), metadata=bearer(key))),
            "no message": lambda key: refused(stub.Chat(pb.ChatRequest(model="sim"), metadata=bearer(key))),
            "tokenize": lambda key: stub.Tokenize(pb.TokenizeRequest(model="sim", text="a"), metadata=bearer(key)),
            "detokenize": lambda key: stub.Detokenize(
                pb.DetokenizeRequest(model="sim", token_ids=[5]), metadata=bearer(key)
            ),
            "wrong over HTTP": lambda key: fetch(
                keyed.cluster, "/v1/chat/completions", {"messages": 5}, authorization=f"Bearer {key}"
            ),
            "no JSON": lambda key: fetch(keyed.cluster, "/v1/completions", b"{", authorization=f"Bearer {key}"),
        }
        for name, attempt in tries.items():
            key = await keyed.key(name.replace(" ", "-").lower(), limits={"requests_per_minute": 2})
            await attempt(key)
            await attempt(key)
            answer = await refused(stub.Chat(chat(), metadata=bearer(key)))
            assert (answer.code, answer.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"), name
            reply = await fetch(keyed.cluster, "/v1/completions", b"{", authorization=f"Bearer {key}")
            assert reply.status == 429, name


async def test_a_prompt_of_several_is_a_request_each(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """For the limit `requests_per_minute`, a body with three prompts counts as three requests, and a call with one
    prompt as one."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint), bundle)
        key = await keyed.key("three", limits={"requests_per_minute": 4})
        body = {"model": "sim", "prompt": ["a", "b", "c"], "max_tokens": 1}
        assert (await fetch(keyed.cluster, "/v1/completions", body, authorization=f"Bearer {key}")).status == 200
        assert await end_of(keyed, key) == "OK"
        assert await end_of(keyed, key) == "RATE_LIMITED"


async def test_tokens_that_no_call_has_count_too(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Tokenize and Detokenize use up tokens_per_minute, a long text before it is read. They refuse more ids than the
    model's context holds."""
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, max_model_len=256), bundle)
        stub = keyed.cluster.stub
        key = await keyed.key("few", limits={"tokens_per_minute": 40})
        ids = pb.DetokenizeRequest(model="sim", token_ids=[5] * 30)
        await stub.Detokenize(ids, metadata=bearer(key))
        answer = await refused(stub.Detokenize(ids, metadata=bearer(key)))
        assert answer.reason == "RATE_LIMITED"
        text = pb.TokenizeRequest(model="sim", text="hello there " * 10)
        assert (await refused(stub.Tokenize(text, metadata=bearer(key)))).reason == "RATE_LIMITED"
        free = await keyed.key("free")
        long = pb.TokenizeRequest(model="sim", text="hello there " * 4000)
        for some, reason in ((key, "RATE_LIMITED"), (free, "CONTEXT_LENGTH_EXCEEDED")):
            assert (await refused(stub.Tokenize(long, metadata=bearer(some)))).reason == reason
        many = pb.DetokenizeRequest(model="sim", token_ids=[5] * 257)
        answer = await refused(stub.Detokenize(many, metadata=bearer(free)))
        assert (answer.code, answer.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["token_ids"])
        wrong = await refused(
            stub.Detokenize(pb.DetokenizeRequest(model="sim", token_ids=[5, -1]), metadata=bearer(free))
        )
        assert wrong.fields == ["token_ids[1]"]
