"""What clients and proxies do with a connection besides plain requests: Expect, Upgrade, targets of other forms."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from cluster.gateway.apis.http.response_transport import ResponseTransport
from cluster.wire.bundle import Bundle
from tests.gateway.apis.http.raw import read_all
from tests.gateway.apis.http.test_bounds import END_S, Echo, echo, exchange
from tests.support.certificates import Authority
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine
from tests.support.http import Wire, chat_body, message_body
from tests.support.keyed import keyed_cluster
from tests.support.loop_clock import within
from tests.support.pooling import EMBEDDER

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = b"POST /a HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\n"
LAST = b"GET /last HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"


def test_all_that_uvicorn_uses_of_a_transport_is_there() -> None:
    """The transport of a response has each attribute of a transport that uvicorn's code of a response uses."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(RequestResponseCycle)))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.transport"
    }
    assert used >= {"write", "close"}
    assert used <= set(dir(ResponseTransport))


# ---- Expect


async def converse(app: Echo, *turns: tuple[bytes, bytes]) -> bytes:
    """Send the first part of each turn once the second part of the turn before has been received. Returns what is
    received after the last turn, until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    try:
        for sent, awaited in turns:
            writer.write(sent)
            if awaited:
                assert (await within(END_S, reader.readuntil(awaited))) == awaited
        return await within(END_S, read_all(reader))
    finally:
        writer.close()


@pytest.mark.parametrize("value", [b"100-continue", b"100-Continue \t", b"100-continue, 100-continue"])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: 2000000\r\n", b"x" * 2_000_000),
        (b"transfer-encoding: chunked\r\n", b"1e8480\r\n" + b"x" * 2_000_000 + b"\r\n0\r\nexpect: x\r\n\r\n"),
        (H2C + b"content-length: 2000000\r\n", b"x" * 2_000_000),
    ],
    ids=["length", "chunked, with a trailer", "with an upgrade"],
)
async def test_a_client_that_waits_is_asked_for_the_body(value: bytes, framing: bytes, body: bytes) -> None:
    """A client that expects 100 Continue gets it before it sends the body, and the connection can be used again unless
    the client asked for an upgrade."""
    head = b"POST /a HTTP/1.1\r\nhost: a\r\nexpect: " + value + b"\r\n" + framing + b"\r\n"
    async with echo() as app:
        answer = await converse(app, (head, CONTINUE), (body + LAST, b""))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n")
    assert answer.count(b"2000000") == 1
    assert [scope["path"] for scope in app.seen] == (["/a"] if H2C in framing else ["/a", "/last"])


async def test_a_pipelined_client_is_asked_in_its_turn() -> None:
    """100 Continue for a pipelined request comes after the answers to the requests before it."""
    first = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc"
    head = EXPECT + b"content-length: 5\r\n\r\n"
    async with echo() as app:
        answer = await converse(
            app,
            (first + first + head, b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n3" * 2 + CONTINUE),
            (b"abcde" + head, b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n5" + CONTINUE),
            (b"abcde" + LAST, b""),
        )
    assert answer.count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (EXPECT.replace(b"/1.1", b"/1.0") + b"content-length: 2\r\n\r\n", b"ab", b"200"),  # HTTP/1.0 has no 100
        (b"POST /a HTTP/1.1\r\nhost: a\r\nexpect:\r\nconnection: close\r\ncontent-length: 2\r\n\r\n", b"ab", b"200"),
        (EXPECT + b"expect: other\r\ncontent-length: 2\r\n\r\n", b"", b"417"),
        (EXPECT.replace(b"100-continue", b"100-continue, x=y") + b"content-length: 2\r\n\r\n", b"", b"417"),
        (EXPECT.replace(b"/a", b"/refuse") + b"content-length: 2\r\n\r\n", b"", b"200"),  # no body is wanted
        (EXPECT.replace(b"/a", b"/refuse") + b"transfer-encoding: chunked\r\n\r\n", b"", b"200"),
    ],
)
async def test_a_client_is_not_asked_in_vain(head: bytes, body: bytes, status: bytes) -> None:
    """There is no 100 Continue for HTTP/1.0, for another expectation, and before an answer that needs no body. Such an
    answer closes the connection, since the next bytes could be the body or another request."""
    async with echo() as app:
        answer = await converse(app, (head + body, b""))
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"\r\nconnection: close\r\n" in answer
    assert b"100 Continue" not in answer


async def test_an_answer_to_a_body_that_has_begun_keeps_its_connection() -> None:
    """A client that sends the body without waiting keeps its connection, whatever it expected."""
    async with echo() as app:
        head = EXPECT.replace(b"/a", b"/refuse") + b"content-length: 4\r\n\r\n"
        answer = await exchange(app, head + b"ab" + b"cd" + LAST)
    assert answer.count(b"HTTP/1.1 200 ") == 2


# ---- Upgrade and targets


@pytest.mark.parametrize("asked", [H2C, b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-key: eA==\r\n"])
@pytest.mark.parametrize(
    ("framing", "body", "size"),
    [
        (b"", b"", b"0"),
        (b"content-length: 0\r\n", b"", b"0"),
        (b"content-length: 200000\r\n", b"x" * 200_000, b"200000"),
        (b"transfer-encoding: chunked\r\n", b"2\r\nab\r\n3\r\nabc\r\n0\r\na: b\r\n\r\n", b"5"),
    ],
)
async def test_an_upgrade_is_ignored(asked: bytes, framing: bytes, body: bytes, size: bytes) -> None:
    """A request that asks for an upgrade is answered as plain HTTP with its whole body, and nothing after it is
    read."""
    data = b"POST /a HTTP/1.1\r\nhost: a\r\n" + asked + framing + b"\r\n" + body
    async with echo() as app:
        for rest in (b"", LAST, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /a HTTP/1.1\r\ncontent-length: 1\r\n\r\nx"):
            answer = await exchange(app, data + rest)
            head, _, content = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" in head
            assert content == size
    assert len(app.seen) == 4


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://b.example:8000/a?x=1", "/a", b"x=1"),
        (b"HTTPS://b.example:8000", "/", b""),
        (b"http://b.example:8000?x=1", "/", b"x=1"),
    ],
)
async def test_a_target_with_a_host(target: bytes, path: str, query: bytes) -> None:
    """A target in absolute form is the path in it, and its host replaces the header Host."""
    async with echo() as app:
        answer = await exchange(app, b"GET " + target + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    (scope,) = app.seen
    assert (scope["path"], scope["query_string"]) == (path, query)
    assert dict(scope["headers"])[b"host"] == b"b.example:8000"


@pytest.mark.parametrize("line", [b"CONNECT a:80", b"GET a:80", b"GET http://", b"GET b"])
async def test_other_targets_reach_no_handler(line: bytes) -> None:
    """A target that is neither a path nor an URL of HTTP gets 400."""
    async with echo() as app:
        assert (await exchange(app, line + b" HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert app.seen == []


# ---- a real client at a real gateway


async def curl(*arguments: str) -> tuple[str, str]:
    """Run curl with its usual headers, which include Expect for a large body. Returns the answers and curl's log of
    headers."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "--silent", "--verbose", "--max-time", "300", "--expect100-timeout", "250", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, log = await process.communicate()
    return out.decode(), log.decode()


def large(path: Path, body: dict[str, Any]) -> str:
    """Write a JSON body of 1.5 MB into a file. Returns the argument with which curl reads it."""
    path.write_bytes(json.dumps(body).encode() + b" " * 1_500_000)
    return f"@{path}"


@pytest.mark.slow
@pytest.mark.needs("curl")
@pytest.mark.parametrize("tls", [False, True])
async def test_curl_with_large_bodies(tmp_path: Path, checkpoint: Path, bundle: Bundle, tls: bool) -> None:
    """Bodies above 1 MB, before which curl expects 100 Continue, are answered by all three APIs, one after the other on
    one connection, over TLS too, and also if curl asks for HTTP/2."""
    files = Authority(tmp_path / "ca").issue("gateway")
    secure = f"gateway:\n  tls: {{cert_file: {files.cert_file}, key_file: {files.key_file}}}\n"
    text = LOOPBACK.replace("gateway:\n", secure) if tls else LOOPBACK
    async with running_cluster(tmp_path / "run", text) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        await cluster.add_worker(sim_engine(checkpoint, max_model_len=64, **EMBEDDER), bundle, model="embed")
        scheme, ca = ("https", ["--cacert", str(files.ca_file)]) if tls else ("http", [])
        base = f"{scheme}://{cluster.gateway.endpoints['http']}/v1"
        json_kind = ["--header", "content-type: application/json"]
        requests = [
            (f"{base}/chat/completions", large(tmp_path / "chat", chat_body(max_tokens=1))),
            (f"{base}/embeddings", large(tmp_path / "embed", {"model": "embed", "input": "hello"})),
            (f"{base}/messages", large(tmp_path / "message", message_body(max_tokens=1))),
        ]
        arguments: list[str] = []
        for url, body in requests:
            arguments += [*(["--next"] if arguments else []), *ca, *json_kind, "--data-binary", body, url]
        out, log = await curl(*arguments)
        assert log.count("< HTTP/1.1 100 Continue") == log.count("< HTTP/1.1 200 OK") == len(requests), log + out
        assert log.count("Connected to") + log.count("Established connection") == 1
        assert out.count('"usage"') == len(requests)
        url, body = requests[0]
        out, log = await curl(
            "--http2", "--header", "expect: 100-continue", *ca, *json_kind, "--data-binary", body, url
        )
        assert log.count("< HTTP/1.1 100 Continue") == log.count("< HTTP/1.1 200 OK") == 1, log + out


@pytest.mark.needs("curl")
async def test_curl_is_refused_before_it_sends_the_body(tmp_path: Path) -> None:
    """A body beyond the limit, a wrong key and a wrong media type are refused before the client sends the body."""
    async with keyed_cluster(tmp_path, gateway="  max_message_bytes: 1048576\n") as keyed:
        key = await keyed.key("acme")
        url = f"http://{keyed.cluster.gateway.endpoints['http']}/v1/chat/completions"
        kind = ["--header", "content-type: application/json", "--data-binary", large(tmp_path / "body", chat_body())]
        for status, headers in (
            (413, [f"authorization: Bearer {key}"]),
            (401, ["authorization: Bearer hr_wrong"]),
            (415, [f"authorization: Bearer {key}", "content-type: text/plain"]),
        ):
            named = [part for header in headers for part in ("--header", header)]
            out, log = await curl(*(named + kind[2:] if status == 415 else named + kind), url)
            assert f"< HTTP/1.1 {status}" in log, log
            assert "< connection: close" in log
            assert "100 Continue" not in log
            assert json.loads(out)["error"]["message"]


async def test_a_body_of_unknown_length_is_refused_within_it(cluster: TestCluster) -> None:
    """A chunked body is asked for with 100 Continue, and a request with a wrong one gets its error afterwards."""
    wire = await Wire.open(cluster)
    try:
        wire.ask(
            "/v1/chat/completions",
            b"",
            content_type="application/json",
            transfer_encoding="chunked",
            expect="100-continue",
        )
        assert (await wire.head())[0] == 100
        wire.writer.write(b"3\r\n{:}\r\n0\r\n\r\n")
        reply = await wire.reply()
        assert (reply.status, "connection" in reply.headers) == (400, False)
    finally:
        await wire.close()


# ---- HTTP/1.0


@pytest.mark.parametrize("asked", [b"", b"connection: keep-alive\r\n"])
@pytest.mark.parametrize("stream", [True, False])
async def test_an_old_client_gets_no_chunks(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, asked: bytes, stream: bool
) -> None:
    """A response to HTTP/1.0 has a content-length or ends with the connection: that version has no chunks."""
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    body = json.dumps(chat_body(stream=stream, max_tokens=3)).encode()
    host, port = cluster.gateway.endpoints["http"].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.0\r\nhost: a\r\ncontent-type: application/json\r\n" + asked)
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
    head, _, content = (await within(END_S, read_all(reader))).partition(b"\r\n\r\n")
    writer.close()
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    if stream:
        events = content.split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        assert all(json.loads(event.removeprefix(b"data: ")) for event in events[:-2])
    else:
        assert json.loads(content)["choices"]
