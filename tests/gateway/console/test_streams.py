"""Event streams of the console: the scope of each viewer, and streams that end with the session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cluster.config.document import parse
from cluster.gateway.apis.http.exchange import Endpoint, Exchange, Receive, Scope, Send
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.console.access.access import ConsoleAccess, Viewer
from cluster.gateway.console.access.sessions import ConsoleSession
from cluster.gateway.console.errors import FORM
from cluster.gateway.console.overview.live import MAX_SUBSCRIBERS
from cluster.gateway.console.streams import SESSION_STREAMS, TENANT_STREAMS, TENANTS_STREAMS, ViewerStreams
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.cluster import LOOPBACK, until


class CountingFeed:
    """A feed that sends the name of the viewer's tenant once and then waits until the client disconnects."""

    def __init__(self) -> None:
        self.open = 0
        self.fails = False

    async def events(self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str) -> None:
        """Implements `ViewerFeed.events`."""
        self.open += 1
        try:
            if self.fails:
                raise RuntimeError("the feed is broken")
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"x-tenant", viewer_tenant.encode())]}
            )
            await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self.open -= 1

    async def history(self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str) -> None:
        """Implements `ViewerFeed.history`."""
        headers = [(b"content-length", b"%d" % len(viewer_tenant))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": viewer_tenant.encode(), "more_body": False})


class Page:
    """A server with one event stream and the history. The test chooses the viewer."""

    def __init__(self) -> None:
        self.feed = CountingFeed()
        self.changes: set[Callable[[], None]] = set()
        self.wall = 1_800_000_000.0
        settings = parse(LOOPBACK).gateway
        self.access = ConsoleAccess(settings, None, lambda: [b"s" * 32], lambda: self.wall)
        self.streams = ViewerStreams(self.access, self.feed, self.changes)
        self.viewer = self.viewer_for(60)
        self.port = 0
        self.writers: list[asyncio.StreamWriter] = []  # kept: a forgotten one is closed

    def viewer_for(self, seconds: float, role: str = "operator", tenant: str = "ops") -> Viewer:
        """Return a viewer with a new session that lasts for `seconds`."""
        session = ConsoleSession.begin("nobody", "", tenant, role, expires_at_s=self.wall + seconds)
        principal = Principal(TenantPolicy(tenant), role)
        return Viewer(session, principal, principal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        act: Any = self.streams.events if scope["path"] == "/events" else self.streams.history

        async def answer(exchange: Exchange) -> None:
            await act(exchange, self.viewer)

        await Endpoint(FORM, "GET", answer)(scope, receive, send)

    async def get(self, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request and return the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        return reader, writer


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    """Provide a running page."""
    page = Page()
    server = HttpServer(page)
    page.port = await server.start("127.0.0.1", 0)
    yield page
    page.streams.close()
    await server.stop(5)


@pytest.mark.parametrize(
    ("role", "scope"), [("operator", ""), ("viewer", ""), ("tenant_admin", "acme"), ("caller", "acme")]
)
async def test_each_role_has_its_scope(page: Page, role: str, scope: str) -> None:
    """Operators and viewers see all tenants. Other roles see only their own tenant."""
    page.viewer = page.viewer_for(60, role, "acme")
    reader, writer = await page.get("/events")
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert f"x-tenant: {scope}\r\n" in head
    writer.close()
    await until(lambda: not page.feed.open, "the stream has ended")
    reader, writer = await page.get("/history")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert await reader.readexactly(len(scope)) == scope.encode()
    writer.close()


async def test_a_stream_ends_with_its_session(page: Page) -> None:
    """A stream ends properly when a change ends its session, and continues after any other change."""
    reader, _ = await page.get("/events")
    await reader.readuntil(b"data: {}\n\n")
    for change in page.changes:
        change()
    await asyncio.sleep(0)
    assert page.feed.open == 1
    page.wall += 61
    for change in page.changes:
        change()
    assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60)).endswith(b"0\r\n\r\n")
    assert not page.feed.open


async def test_a_stream_ends_when_its_session_expires(page: Page) -> None:
    """An event stream ends when its session expires, even if no event is sent."""
    page.viewer = page.viewer_for(0.2)
    reader, _ = await page.get("/events")
    assert (await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60)).endswith(b"0\r\n\r\n")


async def places(page: Page, role: str, tenant: str, count: int, *, new_sessions: bool) -> list[asyncio.StreamReader]:
    """Open streams of a tenant's viewer, one after the other. Returns their connections, each read up to its first
    event."""
    readers = []
    for at in range(count):
        if new_sessions or not at:
            page.viewer = page.viewer_for(60, role, tenant)
        reader, _ = await page.get("/events")
        await reader.readuntil(b"data: {}\n\n")
        readers.append(reader)
    return readers


async def replaced(reader: asyncio.StreamReader) -> bool:
    """Return whether a stream ends because another has its place."""
    return b'event: end\ndata: {"reason":"replaced"}' in await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60)


@pytest.mark.parametrize("role", ["caller", "operator"])
async def test_a_session_has_few_streams(page: Page, role: str) -> None:
    """A further stream of a session ends its oldest one, for every role."""
    readers = await places(page, role, "acme", SESSION_STREAMS + 2, new_sessions=False)
    assert [await replaced(reader) for reader in readers[:2]] == [True, True]
    await until(lambda: page.feed.open == SESSION_STREAMS, "the others go on")


async def test_tenants_leave_places_to_operators_and_to_each_other(page: Page) -> None:
    """A tenant's callers have bounded streams over all sessions, and all tenants together have, too. A tenant without a
    stream gets the place of the tenant with the most. Operators' streams are not counted to these bounds."""
    operators = await places(page, "operator", "acme", MAX_SUBSCRIBERS - TENANTS_STREAMS, new_sessions=True)
    first = await places(page, "caller", "acme", 32, new_sessions=True)
    assert all([await replaced(reader) for reader in first[: 32 - TENANT_STREAMS]])
    assert page.feed.open == len(operators) + TENANT_STREAMS
    await places(page, "tenant_admin", "beta", 20, new_sessions=True)
    assert page.feed.open == len(operators) + TENANTS_STREAMS
    await places(page, "caller", "gamma", 1, new_sessions=True)
    assert await replaced(first[32 - TENANT_STREAMS])
    for number in range(TENANTS_STREAMS):
        await places(page, "caller", f"t{number}", 1, new_sessions=True) if number < TENANTS_STREAMS - 3 else None
    page.viewer = page.viewer_for(60, "caller", "one-more")
    reader, _ = await page.get("/events")
    assert b" 503 " in await reader.readuntil(b"\r\n")
    assert page.feed.open == len(operators) + TENANTS_STREAMS
    for task in list(page.streams._open)[: len(operators)]:
        assert not task.done()


async def test_streams_end_with_the_gateway(page: Page) -> None:
    """All streams end when the gateway stops, so the gateway need not wait for them. No stream is accepted
    afterwards."""
    connections = [await page.get("/events") for _ in range(3)]  # of one session
    await until(lambda: page.feed.open == 3, "the streams have begun")
    page.streams.close()
    for reader, writer in connections:
        await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 60)
        writer.close()
    await page.get("/events")
    await until(lambda: not page.feed.open, "no stream is open")


async def test_a_broken_feed_is_an_error(page: Page) -> None:
    """A feed that fails before it has answered causes status 500. The answer does not contain the error's message."""
    page.feed.fails = True
    reader, _ = await page.get("/events")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 500")
    assert b"broken" not in head
