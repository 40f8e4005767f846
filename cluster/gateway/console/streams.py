"""The live data of the console: event streams and history, limited to what the viewer may see.

A stream could outlive its console session. So the gateway ends the stream in two cases: the session
expires, or a change of tenants or keys ends the session or changes the viewer's rights. The page then
requests its session again. If there is still a session, the page reconnects; otherwise it shows the
sign-in.

The places of a process are shared so that nobody can take them all. A session has at most SESSION_STREAMS, a tenant
TENANT_STREAMS, and all tenants together TENANTS_STREAMS; the others are for operators and viewers. A further stream
ends the oldest one of those that are too many, with the event `end` and the reason `replaced`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.http.exchange import Exchange, Message, Receive, Scope, Send
from cluster.gateway.console.access.access import ConsoleAccess, Viewer

RETRY_S: Final = 5.0
SESSION_STREAMS: Final = 4
TENANT_STREAMS: Final = 8
TENANTS_STREAMS: Final = 16
_REPLACED: Final = b'event: end\ndata: {"reason":"replaced"}\n\n'


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

    async def end(self, last: bytes) -> None:
        """End a response that has begun, with a last part of its body."""
        if self.started and not self.ended:
            await self.send({"type": "http.response.body", "body": last, "more_body": False})


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
        gateway stops. Raises CallError if the tenant's place cannot be had without another tenant's last one."""
        self._make_place(viewer)
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
                await response.end(b"" if task in self._open else _REPLACED)
        finally:
            timer.cancel()
            task.cancel()
            self._open.pop(task, None)

    def _make_place(self, viewer: Viewer) -> None:
        """End the oldest stream of the session, of the tenant, or of the tenant with the most streams, if the viewer's
        stream would be one too many."""
        if self._count(lambda other: other.session.csrf == viewer.session.csrf) >= SESSION_STREAMS:
            self._replace(lambda other: other.session.csrf == viewer.session.csrf)
        if not viewer.scope:
            return
        streams = Counter(other.scope for other in self._open.values() if other.scope)
        own = streams[viewer.scope]
        if own >= TENANT_STREAMS:
            self._replace(lambda other: other.scope == viewer.scope)
        elif streams.total() >= TENANTS_STREAMS:
            (largest, most), *_ = streams.most_common(1)
            if most <= own + 1 and not own:
                text = f"this gateway process shows {TENANTS_STREAMS} consoles of tenants already; retry later"
                raise CallError(Outcome.QUEUE_FULL, text, retry_after_s=RETRY_S)
            self._replace(lambda other: other.scope == (largest if most > own + 1 else viewer.scope))

    def _count(self, condition: Callable[[Viewer], bool]) -> int:
        return sum(map(condition, self._open.values()))

    def _replace(self, condition: Callable[[Viewer], bool]) -> None:
        """End the oldest stream whose viewer meets a condition."""
        oldest = next(task for task, viewer in self._open.items() if condition(viewer))
        del self._open[oldest]
        oldest.cancel()

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
