"""Errors of Anthropic's Messages API: the form, the status, and the names of the caller's fields."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from cluster.api.outcomes import OUTCOME_STATUS, CallError, Outcome, Violation
from cluster.gateway.apis.anthropic.errors import FORM, status_of, with_messages_names
from cluster.gateway.apis.anthropic.requests import NAMES
from cluster.wire.bundle import Bundle
from tests.gateway.apis.anthropic.test_app import COUNT, MESSAGES, client, official
from tests.gateway.apis.anthropic.test_stream import events_of
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.http import Reply, Wire, fetch, message_body
from tests.support.keyed import keyed_cluster

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "api_error",
    529: "overloaded_error",
}


def message_of(reply: Reply) -> str:
    """Return the message of an error reply. Asserts Anthropic's form, the error type for the status, and the request
    id."""
    value = reply.json
    assert value.keys() == {"type", "error", "request_id"}
    assert value["error"].keys() == {"type", "message"}
    assert (value["type"], value["error"]["type"]) == ("error", TYPES[reply.status])
    assert reply.headers["request-id"] == reply.headers["x-request-id"] == value["request_id"]
    assert "Traceback" not in value["error"]["message"]
    return str(value["error"]["message"])


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("messages")) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_model_len=256, kv_blocks=600), bundle)
        yield cluster
        await cluster.until_idle()


@pytest.mark.parametrize("outcome", [outcome for outcome in Outcome if outcome is not Outcome.OK])
def test_every_outcome_has_a_type_for_its_status(outcome: Outcome) -> None:
    """Every outcome except OK has an HTTP error status and an error type of Anthropic. An overload has status 529."""
    error = CallError(outcome, "why")
    status = status_of(error)
    assert status == (529 if TYPES.get(status) == "overloaded_error" else OUTCOME_STATUS[outcome].http)
    answer = FORM.failed(error, "id")
    assert answer.status == status >= 400
    assert (b"retry-after" in dict(answer.headers)) == (error.retry_after_s is not None)
    assert FORM.event(error, "id") == b"event: error\ndata: " + answer.content + b"\n\n"


def test_fields_have_the_callers_names() -> None:
    """The error for a wrong field uses the field's name in Anthropic's API, for example `stop_sequences[1]` instead of
    the internal name `stop[1]`. Names in OpenAI's form of a tool are translated too."""
    fields = ["stop[1]", "messages[0].content", "tools[2].function.parameters.properties", "response_format"]
    named = ["stop_sequences[1]", "messages[0].content", "tools[2].input_schema.properties", "output_config.format"]
    error = CallError(
        Outcome.INVALID_FIELD,
        "; ".join(f"{field}: wrong" for field in fields),
        violations=[Violation(field, "wrong") for field in fields],
    )
    renamed = with_messages_names(error, NAMES)
    assert [violation.field for violation in renamed.violations] == named
    assert renamed.message == "; ".join(f"{field}: wrong" for field in named)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "begins"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"stop_sequences": ["x" * 2000]}, "stop_sequences[0]: "),
        ({"messages": [{"role": "user", "content": "x " * 300}]}, "prompt is too long: "),
    ],
    ids=["block", "max_tokens", "stop", "too long"],
)
async def test_a_wrong_field_is_named(busy: TestCluster, fields: dict[str, Any], begins: str) -> None:
    """The error of an invalid request names the field of the caller's body, for whole and for streamed answers."""
    for stream in (False, True):
        reply = await fetch(busy, MESSAGES, message_body(stream=stream) | fields)
        assert (reply.status, message_of(reply)[: len(begins)]) == (400, begins)


@pytest.mark.slow
async def test_errors_before_a_call(busy: TestCluster) -> None:
    """The error for a wrong path, method or media type, for invalid JSON or for an unknown model has the form of
    Anthropic's API."""
    assert (await fetch(busy, MESSAGES)).headers["allow"] == "POST"
    for path, body, status, headers in (
        (MESSAGES, None, 405, {}),
        (f"{MESSAGES}/batches", {}, 404, {}),
        ("/v1/files", None, 404, {"anthropic_version": "2023-06-01"}),
        (MESSAGES, message_body(), 415, {"content_type": "text/plain"}),
        (MESSAGES, b"{", 400, {}),
        (COUNT, b"[" * 30_000, 400, {}),
        (MESSAGES, message_body(model="nope"), 404, {}),
        (COUNT, message_body(model="nope"), 404, {}),
        (COUNT, message_body(messages=[]), 400, {}),
    ):
        reply = await fetch(busy, path, body, **headers)
        assert (reply.status, bool(message_of(reply))) == (status, True), path
    ok = await fetch(busy, MESSAGES, message_body(), anthropic_beta="some-beta-2026-01-01", x_request_id="mine")
    assert (ok.status, ok.headers["request-id"]) == (200, "mine")


@pytest.mark.slow
async def test_a_body_over_the_limit(tmp_path: Path) -> None:
    """A body over the limit is refused with 413 before it is read."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  max_message_bytes: 65536")
    async with running_cluster(tmp_path, config) as cluster:
        wire = await Wire.open(cluster)
        wire.ask(MESSAGES, b"{", content_length=str(1 << 40))
        reply = await wire.reply()
        assert (reply.status, "65536" in message_of(reply)) == (413, True)
        await wire.close()


@pytest.mark.slow
async def test_keys(tmp_path: Path) -> None:
    """A request with a valid key in x-api-key, as a bearer token, or in both is accepted. A request without a key, with
    a wrong key or with two different keys is refused before its body is read. A call over a tenant's limit gets an
    error with a retry delay."""
    async with keyed_cluster(tmp_path) as keyed:
        key = await keyed.key("acme", limits={"requests_per_minute": 60})
        bearer = f"Bearer {key}"
        models = {"anthropic_version": "2023-06-01"}
        for headers in ({"x_api_key": key}, {"authorization": bearer}, {"x_api_key": key, "authorization": bearer}):
            reply = await keyed.fetch("/v1/models", **headers, **models)
            assert (reply.status, reply.json["has_more"]) == (200, False)
            waiting = await keyed.fetch(MESSAGES, message_body(), **headers)
            assert (waiting.status, bool(message_of(waiting))) == (529, True), "no worker has come yet"
        for wrong in ({}, {"x_api_key": ""}, {"x_api_key": "nope"}, {"x_api_key": "nope", "authorization": bearer}):
            for path in (MESSAGES, COUNT):
                reply = await keyed.fetch(path, b"{", content_length="1000000", **wrong)
                assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
                assert message_of(reply)
        openai = await keyed.fetch("/v1/models", x_api_key=key)
        assert (openai.status, openai.json["error"]["code"]) == (401, "unauthenticated_key")
        replies = [await keyed.fetch(COUNT, message_body(), x_api_key=key) for _ in range(70)]
        limited = next(reply for reply in replies if reply.status == 429)
        assert message_of(limited)
        assert int(limited.headers["retry-after"]) >= 1


@pytest.mark.slow
async def test_the_official_clients_exceptions(busy: TestCluster, cluster: TestCluster) -> None:
    """The official client raises the exception that matches each error."""
    body = official(message_body())
    async with client(busy) as ai:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await ai.messages.create(**body | {"model": "nope"})
        assert missing.value.request_id
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            await ai.messages.create(**body | {"max_tokens": 0})
    async with client(cluster) as ai:
        with pytest.raises(anthropic.APIStatusError) as loading:
            await ai.messages.create(**body)
        assert (loading.value.status_code, loading.value.response.headers["retry-after"]) == (529, "2")


@pytest.mark.slow
async def test_a_worker_lost_in_mid_stream(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a worker is lost and the call is not resumed, the stream ends with an error event, and the official client
    raises an exception."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_attempts: 1}")
    async with running_cluster(tmp_path, config) as cluster:
        worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=20), bundle)
        wire = await Wire.open(cluster)
        wire.ask(MESSAGES, message_body(max_tokens=2000, stream=True))
        assert (await wire.head())[0] == 200
        body = official(message_body(max_tokens=2000))
        async with client(cluster) as ai, ai.messages.stream(**body) as stream:
            await until(lambda: len([c for c in cluster.gateway.service.calls if c.first_token_at]) == 2, "tokens come")
            await worker.stop()
            with pytest.raises(anthropic.APIStatusError, match="the worker was lost"):
                async for _ in stream:
                    pass
        chunks = []
        while chunk := await wire.chunk():
            chunks.append(chunk)
        (error,) = events_of(chunks[-1])
        assert (error["type"], error["error"]["type"]) == ("error", "api_error")
        await wire.close()
        await cluster.until_idle()
