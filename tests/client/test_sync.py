"""The blocking client works with a real gRPC server."""

from __future__ import annotations

import gc
import inspect
import re
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from google.rpc import code_pb2

from cluster.client import UNREACHABLE, AsyncClient, Client, HeadraceError
from cluster.client.aio_calls import AsyncCalls
from cluster.client.sync_calls import BlockingCalls
from cluster.v1 import inference_pb2 as pb
from tests.support.scripted_gateway import WORDS, ScriptedGateway, refusal
from tests.support.shell import until

TEXT = "".join(WORDS)
AWAITING = r"\b(async |await |Async(?=Stream|Iterable)|Awaitable\[(?=Response\]\]))|(?<=Inference)Async(?=Stub)|\W+"
"""Parts of a method that only the asyncio client has, and everything else that is no word."""


def test_both_clients_have_the_same_methods() -> None:
    """The methods of the blocking client have the code of the asyncio client's methods, without `async` and `await`."""

    def calls(client: type, unary: Callable[..., object]) -> dict[str, str]:
        methods: dict[str, Callable[..., object]] = {"unary": unary}
        methods |= {name: f for name, f in vars(client).items() if inspect.isfunction(f) and name[0] != "_"}
        return {name: re.sub(AWAITING, "", inspect.getsource(f)) for name, f in methods.items() if name != "close"}

    assert calls(Client, BlockingCalls.unary) == calls(AsyncClient, AsyncCalls.unary)
    assert inspect.signature(Client) == inspect.signature(AsyncClient)


def test_a_dropped_client_closes_its_connection(gateway: ScriptedGateway) -> None:
    """A client that is deleted without `close` closes its connection at once, without a garbage collection."""
    port = int(gateway.endpoint.rpartition(":")[2])

    def connected() -> bool:
        connections = psutil.Process().net_connections("tcp")
        return any(each.raddr and each.raddr.port == port and each.status == "ESTABLISHED" for each in connections)

    gc.disable()
    try:
        client = Client(gateway.endpoint)
        client.chat("tiny", "Where?")
        assert connected()
        del client
        until(lambda: not connected(), "the connection is closed", 20.0)
    finally:
        gc.enable()


def test_chat_gives_text_reason_and_usage(gateway: ScriptedGateway) -> None:
    """A whole answer has the text, the finish reason, the usage and the ids of the call."""
    with Client(gateway.endpoint) as client:
        answer = client.chat("tiny", "Where?", request_id="r-1", temperature=0.0, stop="\n")
    assert (answer.text, answer.finish_reason, answer.usage.total_tokens) == (TEXT, "stop", 10)
    assert (answer.id, answer.model, answer.request_id, str(answer)) == ("chat-1", "tiny", "r-1", TEXT)
    (request,) = gateway.script.requests
    assert request == pb.ChatRequest(
        model="tiny", messages=[pb.Message(role="user", content="Where?")], temperature=0.0, stop=["\n"]
    )


def test_temperature_zero_is_sent_and_unset_is_not(gateway: ScriptedGateway) -> None:
    """A parameter with the value zero is sent in the request, and an absent parameter is not sent."""
    with Client(gateway.endpoint) as client:
        client.chat("tiny", "x", temperature=0.0)
        client.chat("tiny", "x")
    first, second = gateway.script.requests
    assert first.HasField("temperature")
    assert not second.HasField("temperature")


def test_stream_yields_text_and_keeps_account(gateway: ScriptedGateway) -> None:
    """Iterating over a stream yields only texts; finish reason, usage, id and model are attributes of the stream."""
    with Client(gateway.endpoint) as client:
        stream = client.stream_chat("tiny", "Where?")
        usage_before = stream.usage
        assert list(stream) == list(WORDS)
    assert usage_before is None
    assert stream.usage is not None
    assert stream.usage.completion_tokens == 3
    assert (stream.text, stream.finish_reason, stream.id, stream.model) == (TEXT, "stop", "chat-1", "tiny")


def test_chunks_show_progress_too(gateway: ScriptedGateway) -> None:
    """`chunks()` yields every message, including messages about the progress of a queued call."""
    with Client(gateway.endpoint) as client:
        chunks = list(client.stream_chat("tiny", "Where?").chunks())
    assert [c.HasField("progress") for c in chunks] == [True, False, False, False]
    assert chunks[0].progress.queue_position == 2


def test_completion_takes_text_or_token_ids(gateway: ScriptedGateway) -> None:
    """The prompt of a completion is a text or token ids, both for whole answers and for streams."""
    with Client(gateway.endpoint) as client:
        assert client.complete("tiny", "Once").text == TEXT
        assert list(client.stream_complete("tiny", [1, 2], max_tokens=3)) == list(WORDS)
    first, second = gateway.script.requests
    assert (first.prompt, list(first.prompt_token_ids)) == ("Once", [])
    assert (second.prompt, list(second.prompt_token_ids), second.max_tokens) == ("", [1, 2], 3)


def test_tokens_of_text_and_messages(gateway: ScriptedGateway) -> None:
    """`tokenize` accepts a text or messages, and `detokenize` converts token ids to a text."""
    with Client(gateway.endpoint) as client:
        assert client.tokenize("tiny", "Hé") == list("Hé".encode())
        assert client.tokenize("tiny", [{"role": "user", "content": "Hi"}]) == [72, 105]
        assert client.detokenize("tiny", [72, 105]) == "Hi"


def test_models_reads_every_page(gateway: ScriptedGateway) -> None:
    """A list of models that is longer than one page is returned completely."""
    gateway.script.models = [pb.Model(name=f"m{i}") for i in range(5)]
    gateway.script.page_size = 2
    with Client(gateway.endpoint) as client:
        assert [m.name for m in client.models()] == ["m0", "m1", "m2", "m3", "m4"]
        assert client.model("m3").name == "m3"


def test_metadata_carries_key_request_id_and_headers(gateway: ScriptedGateway) -> None:
    """The API key is sent as a bearer token, together with the request id and headers, and is absent from repr."""
    client = Client(gateway.endpoint, api_key="sk-1")
    with client:
        client.chat("tiny", "x", request_id="r-9", headers={"traceparent": "00-1"})
    (seen,) = gateway.script.metadata
    assert (seen["authorization"], seen["x-request-id"], seen["traceparent"]) == ("Bearer sk-1", "r-9", "00-1")
    assert "sk-1" not in repr(client) + repr(client._options)


def test_deadline_travels_and_a_call_may_name_its_own(gateway: ScriptedGateway) -> None:
    """The client's deadline is sent to the server, and a deadline of a single call overrides the client's deadline."""
    with Client(gateway.endpoint, timeout_s=100) as client:
        client.chat("tiny", "x")
        client.chat("tiny", "x", timeout_s=7)
    first, second = gateway.script.deadlines_s
    assert first is not None
    assert 50 < first <= 101
    assert second is not None
    assert second <= 8


def test_deadline_passed_is_told(gateway: ScriptedGateway) -> None:
    """A stream that does not end before the deadline raises HeadraceError with the reason DEADLINE_EXCEEDED."""
    gateway.script.hold = threading.Event()
    with Client(gateway.endpoint) as client, pytest.raises(HeadraceError) as caught:
        list(client.stream_chat("tiny", "x", timeout_s=0.3))
    assert (caught.value.reason, caught.value.code) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


def test_error_is_read_whole(gateway: ScriptedGateway) -> None:
    """An error has the reason, message, violations, retry delay and request id from the details of the gRPC status."""
    violations = (("messages[0].role", "unknown role 'boss'"),)
    gateway.script.refusals = [
        refusal(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD", "bad", violations=violations, retry_after_s=1.5)
    ]
    with Client(gateway.endpoint) as client, pytest.raises(HeadraceError) as caught:
        client.chat("tiny", "x", request_id="r-2")
    error = caught.value
    assert (error.reason, error.message, error.code, error.request_id) == (
        "INVALID_FIELD",
        "bad",
        "INVALID_ARGUMENT",
        "r-2",
    )
    assert [(v.field, v.description) for v in error.violations] == list(violations)
    assert error.retry_after_s == 1.5


def test_unavailable_is_retried_after_the_servers_pause(gateway: ScriptedGateway) -> None:
    """A call that is refused with UNAVAILABLE before any answer is retried with the same request id."""
    loading = refusal(code_pb2.UNAVAILABLE, "MODEL_LOADING", "loading", retry_after_s=0.05)
    gateway.script.refusals = [loading, loading]
    gateway.script.pushback_ms = 50
    with Client(gateway.endpoint) as client:
        assert "".join(client.stream_chat("tiny", "x")) == TEXT
    assert len(gateway.script.requests) == 3
    assert len({seen["x-request-id"] for seen in gateway.script.metadata}) == 1


def test_a_negative_pause_forbids_the_retry(gateway: ScriptedGateway) -> None:
    """After a negative retry pushback the call is not retried, and the error has the server's reason."""
    gateway.script.refusals = [refusal(code_pb2.UNAVAILABLE, "NO_WORKER", "none")] * 2
    gateway.script.pushback_ms = -1
    with Client(gateway.endpoint) as client, pytest.raises(HeadraceError, match="NO_WORKER: none"):
        client.chat("tiny", "x")
    assert len(gateway.script.requests) == 1


def test_retries_can_be_turned_off(gateway: ScriptedGateway) -> None:
    """If retries are turned off, the first refusal of a call is raised."""
    gateway.script.refusals = [refusal(code_pb2.UNAVAILABLE, "NO_WORKER", "none", retry_after_s=1)]
    with Client(gateway.endpoint, retries=False) as client, pytest.raises(HeadraceError) as caught:
        client.chat("tiny", "x")
    assert (caught.value.reason, caught.value.retry_after_s) == ("NO_WORKER", 1.0)


def test_a_broken_stream_is_not_repeated(gateway: ScriptedGateway) -> None:
    """A failure after received text is raised, the text is kept, and the call is not repeated."""
    gateway.script.break_after = 1
    with Client(gateway.endpoint) as client:
        stream = client.stream_chat("tiny", "x")
        with pytest.raises(HeadraceError) as caught:
            list(stream)
    assert caught.value.reason == "WORKER_LOST"
    assert stream.text == WORDS[0]
    assert len(gateway.script.requests) == 1


@pytest.mark.parametrize("how", ["cancel", "with", "dropped"])
def test_leaving_a_stream_ends_the_call(gateway: ScriptedGateway, how: str) -> None:
    """Cancelling a stream, leaving the `with` block of a stream or dropping a stream ends the call at the gateway."""
    gateway.script.hold = threading.Event()
    client = Client(gateway.endpoint)
    stream = client.stream_chat("tiny", "x")
    assert next(stream) == WORDS[0]
    if how == "cancel":
        stream.cancel()
    elif how == "with":
        with stream:
            pass
    else:
        del stream
    assert gateway.script.ended.wait(60)
    client.close()


@pytest.mark.slow
def test_nobody_there_is_unreachable() -> None:
    """A call to a closed port raises HeadraceError with the reason UNREACHABLE, and the message has the endpoint."""
    with Client("127.0.0.1:1") as client, pytest.raises(HeadraceError) as caught:
        client.models(timeout_s=60)
    assert caught.value.reason == UNREACHABLE
    assert "127.0.0.1:1" in caught.value.message


@pytest.mark.slow
def test_four_megabytes_and_more_pass(gateway: ScriptedGateway) -> None:
    """Messages larger than gRPC's default limit of 4 MB are accepted, up to the gateway's limit."""
    with Client(gateway.endpoint) as client:
        assert len(client.tokenize("tiny", "x" * 5_000_000)) == 5_000_000
        with pytest.raises(HeadraceError) as caught:
            client.tokenize("tiny", "x" * 17_000_000)
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_endpoint_and_key_come_from_the_environment(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment variables HEADRACE_ENDPOINT and HEADRACE_API_KEY replace absent arguments of the client."""
    monkeypatch.setenv("HEADRACE_ENDPOINT", gateway.endpoint)
    monkeypatch.setenv("HEADRACE_API_KEY", "sk-env")
    with Client() as client:
        client.chat("tiny", "x")
    assert gateway.script.metadata[0]["authorization"] == "Bearer sk-env"


@pytest.mark.parametrize("endpoint", ["http://localhost:50051", "grpc://x:1"])
def test_a_scheme_is_refused(endpoint: str) -> None:
    """An endpoint with a scheme raises an error that names the expected form."""
    with pytest.raises(ValueError, match="give host:port"):
        Client(endpoint)


def test_a_missing_certificate_file_is_named(tmp_path: Path) -> None:
    """A missing CA file raises an error when the client is created, and the error names the file."""
    with pytest.raises(FileNotFoundError, match="no-ca"):
        Client("localhost:1", tls_ca_file=tmp_path / "no-ca.crt")
