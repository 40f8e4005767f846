"""The console's endpoints for data that gateways keep in memory: the events of the overview, and the history.

A stream begins with the event `state`, which holds the whole document. Then it sends `delta` about once a second, and
`ping` every PING_S. It ends with the event `end` when the viewer's session is no longer valid or the gateway stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import parse_qs

from cluster.api.outcomes import CallError, Outcome, invalid, quoted
from cluster.gateway.apis.http.exchange import Exchange, Receive, Scope, Send, while_connected
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai.app import FORM
from cluster.gateway.console.history.sampling import query_columns
from cluster.gateway.console.overview.live import END, MAX_SUBSCRIBERS, LiveOverview, Subscriber
from cluster.gateway.console.overview.parts import STEP_S

PING_S: Final = 15.0
"""Seconds between two pings, by which proxies and viewers see that the stream lives."""
CHECK_S: Final = 1.0
"""Seconds between two checks of a viewer's session."""
RETRY_S: Final = 5.0
MAX_SECONDS: Final = 3600
_NUMBER: Final = re.compile(r"[0-9]{1,6}")
_NO_STORE: Final = [(b"cache-control", b"no-store")]


def always() -> bool:
    """Return True. Used as `is_valid` by a caller of `events` that ends the stream itself when the session ends."""
    return True


class FeedEndpoints:
    """The console's endpoints for overview events and for the history, as ASGI functions. The code that calls an
    endpoint must have authenticated the viewer. `viewer_tenant`: the only tenant that the viewer may see, "" for all
    tenants."""

    def __init__(
        self,
        live: LiveOverview,
        wall: Callable[[], float] = time.time,
        ping_s: float = PING_S,
        check_s: float = CHECK_S,
    ) -> None:
        """`wall` returns seconds since the epoch. `ping_s`: seconds between two pings. `check_s`: seconds between two
        checks of a viewer's session."""
        self._live = live
        self._wall = wall
        self._ping_s = ping_s
        self._check_s = check_s

    # ---- events

    async def events(
        self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str, is_valid: Callable[[], bool] = always
    ) -> None:
        """Stream the overview. `is_valid`: returns whether the viewer's session is still valid. It is called every
        CHECK_S."""
        exchange = Exchange(FORM, scope, receive, send)
        subscriber = self._live.subscribe(viewer_tenant)
        if subscriber is None:
            message = f"this gateway process shows {MAX_SUBSCRIBERS} consoles already, or stops; close one or retry"
            await exchange.fail(CallError(Outcome.QUEUE_FULL, message, retry_after_s=RETRY_S))
            return
        subscriber.on_cut = scope[CONNECTION].transport.abort  # the viewer does not read; it may reconnect
        try:
            with contextlib.suppress(ConnectionResetError):
                await while_connected(self._stream(exchange, subscriber, is_valid), scope[CONNECTION])
        finally:
            self._live.unsubscribe(subscriber)

    async def _stream(self, exchange: Exchange, subscriber: Subscriber, is_valid: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        pinged = loop.time()
        await exchange.write(b": headrace console\n\n")
        while not subscriber.is_cut:
            if not is_valid():
                await exchange.write(_event(END, b'{"reason":"session"}'), more=False)
                return
            if loop.time() - pinged >= self._ping_s:
                pinged = loop.time()
                await exchange.write(_event(b"ping", b"{}"))
            try:
                async with asyncio.timeout(self._check_s):
                    name, data = await subscriber.next_event()
            except TimeoutError:
                continue
            await exchange.write(_event(name, data), more=name != END)
            if name == END:
                return

    # ---- history

    async def history(self, scope: Scope, receive: Receive, send: Send, viewer_tenant: str) -> None:
        """Answer with the values of the last hour, or of the last `seconds` that the query names, for a model, a tenant
        or the whole cluster."""
        exchange = Exchange(FORM, scope, receive, send)
        try:
            answer = await self._history(scope.get("query_string", b""), viewer_tenant)
        except CallError as error:
            await exchange.fail(error)
            return
        import orjson

        await exchange.respond(200, orjson.dumps(answer), _NO_STORE)

    async def _history(self, query_string: bytes, viewer_tenant: str) -> Mapping[str, Any]:
        from cluster.gateway.console.history import history

        fields = _fields(query_string)
        series = [name for name in fields.get("series", "").split(",") if name] or ["tokens"]
        for name in series:
            if name not in history.SERIES:
                raise invalid("series", f"has no {quoted(name)}; there are {', '.join(history.SERIES)}")
        series = list(dict.fromkeys(series))
        model, tenant = fields.get("model", ""), fields.get("tenant", "") or viewer_tenant
        if viewer_tenant and tenant != viewer_tenant:
            raise CallError(Outcome.NOT_FOUND, f"tenants/{quoted(tenant)} does not exist")
        if model and tenant:
            raise invalid("model", "cannot be combined with a tenant: series are kept of each model and of each tenant")
        steps = _seconds(fields.get("seconds", "")) // STEP_S
        last = int(self._wall() // STEP_S)
        first = last - steps + 1
        columns_needed = history.columns_of(series)
        query = {"columns": columns_needed, "model": model, "tenant": tenant, "first": first, "last": last}
        own = await query_columns(self._live.history, query)
        others = await self._live.peers.history(query)
        columns = await history.add_columns([own, *others], steps)
        if not self._live.has_cost:
            columns.pop("cost", None)
        return {"step_s": STEP_S, "from_s": first * STEP_S, "series": history.compute(series, columns, steps)}


def _fields(query_string: bytes) -> dict[str, str]:
    """Return the parameters of a request. Raises CallError."""
    try:
        found = parse_qs(query_string.decode("ascii"), max_num_fields=16, strict_parsing=bool(query_string))
    except ValueError:
        raise invalid("query", "must be parameters such as series=tokens&seconds=600, at most 16 of them") from None
    return {name: values[-1] for name, values in found.items()}


def _seconds(text: str) -> int:
    if not text:
        return MAX_SECONDS
    if not _NUMBER.fullmatch(text) or not STEP_S <= int(text) <= MAX_SECONDS:
        raise invalid("seconds", f"must be a whole number from {STEP_S} to {MAX_SECONDS}")
    return int(text)


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: " + name + b"\ndata: " + data + b"\n\n"
