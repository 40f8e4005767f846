"""The console's endpoints for data that lives in the gateway: the events of the overview, and the history.

A stream begins with the event `state`, which holds the whole document, and goes on with `delta` about once a second and
`ping` every PING_S. It ends with the event `end` when the viewer's session is no longer valid.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.http.exchange import Exchange, Receive, Scope, Send, while_connected
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai.app import FORM
from cluster.gateway.console.live import END, MAX_SUBSCRIBERS, LiveOverview, Subscriber

PING_S: Final = 15.0
"""Seconds between two pings, by which proxies and viewers see that the stream lives."""
CHECK_S: Final = 1.0
"""Seconds between two checks of a viewer's session."""
RETRY_S: Final = 5.0


class Feed:
    """The endpoints, as ASGI functions. The caller has authenticated the viewer and says what the viewer may see."""

    def __init__(self, live: LiveOverview) -> None:
        self._live = live

    async def events(
        self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str, is_valid: Callable[[], bool]
    ) -> None:
        """Stream the overview. `viewer_tenant`: the only tenant that the viewer may see, "" for all. `is_valid`:
        whether the viewer's session is still valid, asked every second."""
        exchange = Exchange(FORM, scope, receive, send)
        subscriber = self._live.subscribe(viewer_tenant)
        if subscriber is None:
            message = f"this gateway process shows {MAX_SUBSCRIBERS} consoles already; close one or retry later"
            await exchange.fail(CallError(Outcome.QUEUE_FULL, message, retry_after_s=RETRY_S))
            return
        try:
            with contextlib.suppress(ConnectionResetError):
                await while_connected(self._stream(exchange, subscriber, is_valid), scope[CONNECTION])
        finally:
            self._live.unsubscribe(subscriber)

    async def _stream(self, exchange: Exchange, subscriber: Subscriber, is_valid: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        pinged = loop.time()
        await exchange.write(b": headrace console\n\n")
        subscriber.on_cut = exchange.scope[CONNECTION].transport.abort  # the viewer does not read; it may come again
        while not subscriber.is_cut:
            if not is_valid():
                await exchange.write(_event(END, b'{"reason":"session"}'), more=False)
                return
            if loop.time() - pinged >= PING_S:
                pinged = loop.time()
                await exchange.write(_event(b"ping", b"{}"))
            try:
                async with asyncio.timeout(CHECK_S):
                    name, data = await subscriber.next_event()
            except TimeoutError:
                continue
            await exchange.write(_event(name, data), more=name != END)
            if name == END:
                return


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: " + name + b"\ndata: " + data + b"\n\n"
