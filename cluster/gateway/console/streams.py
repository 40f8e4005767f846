"""The live data of the console: event streams and history, limited to what the viewer may see.

A stream could outlive its console session. So the gateway ends the stream in two cases: the session
expires, or a change of tenants or keys ends the session or changes the viewer's rights. The page then
requests its session again. If there is still a session, the page reconnects; otherwise it shows the
sign-in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from cluster.api.outcomes import CallError
from cluster.gateway.apis.http.exchange import Exchange, Message, Receive, Scope, Send
from cluster.gateway.console.access.access import ConsoleAccess, Viewer


class ViewerFeed(Protocol):
    """The live data of a gateway process, as ASGI applications. `viewer_tenant`: the only tenant that the viewer may
    see, "" for all."""

    async def events(self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str) -> None:
        """Answer with a stream of server-sent events, which ends when the client disconnects. `viewer_tenant`: the only
        tenant that the viewer may see, "" for all."""

    async def history(self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str) -> None:
        """Answer with the values of the last hour."""


class _Response:
    """The state of a response while an ASGI application sends it."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False
        self.ended = False

    async def send(self, message: Message) -> None:
        """Send a part of the response."""
        self.started = True
        self.ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """End a response that has begun."""
        if self.started and not self.ended:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class ViewerStreams:
    """The open event streams of one gateway process."""

    def __init__(self, access: ConsoleAccess, feed: ViewerFeed, on_change: set[Callable[[], None]]) -> None:
        """`on_change`: the functions that are called when tenants or keys may have changed."""
        self._access = access
        self._feed = feed
        self._open: dict[asyncio.Task[None], Viewer] = {}
        self._closing = False
        on_change.add(self._recheck)

    async def events(self, exchange: Exchange, viewer: Viewer) -> None:
        """Answer with the events for a viewer. The stream ends when the client disconnects, the session ends or the
        gateway stops."""
        response = _Response(exchange.send)
        work = self._feed.events(exchange.scope, exchange.receive, response.send, viewer.scope)
        task = asyncio.ensure_future(work)
        self._open[task] = viewer
        timer = asyncio.get_running_loop().call_later(self._access.seconds_left(viewer.session), task.cancel)
        if self._closing:
            task.cancel()
        try:
            await asyncio.wait([task])
            exchange.started = response.started
            if not task.cancelled():
                task.result()
            with suppress(ConnectionError):
                await response.end()
        finally:
            timer.cancel()
            task.cancel()
            self._open.pop(task, None)

    async def history(self, exchange: Exchange, viewer: Viewer) -> None:
        """Answer with the history that a viewer may see."""
        await self._feed.history(exchange.scope, exchange.receive, exchange.send, viewer.scope)

    def close(self) -> None:
        """End all event streams, because the gateway stops."""
        self._closing = True
        for task in list(self._open):
            task.cancel()

    def _recheck(self) -> None:
        """End each stream whose session has ended, or whose viewer may no longer see the same tenants."""
        for task, viewer in list(self._open.items()):
            try:
                has_ended = self._access.check(viewer.session).scope != viewer.scope
            except CallError:
                has_ended = True
            if has_ended:
                task.cancel()
