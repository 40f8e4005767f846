"""Reading of request bodies within the budget of request bytes, which all ports of the process share.

The caller is authenticated before the body is read. A body that arrives in one read is accepted without a reservation.
For a longer body the whole size is reserved first (policy/limits/request_bytes.py), and reading is paused until the
reservation is granted. All bodies together, up to the encoding of their prompts, thus hold no more than the budget plus
one read for each body.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from cluster.gateway.apis.http.connection import HttpConnection
from cluster.gateway.calls.meta import do_nothing
from cluster.policy.limits.request_bytes import RequestBytes, Reservation

GRANT_TIMEOUT_S: Final = 30.0
"""Longest wait in seconds for a reservation, behind other bodies of the tenant or of the process."""
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Refused(Exception):
    """Raised to answer a request with an HTTP error before the request becomes a call."""

    def __init__(self, status: int, code: str, message: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers


UNCOPIED_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Body:
    """A whole request body. `release`: returns its bytes to the budget of request bytes; idempotent."""

    content: bytes | bytearray
    release: Callable[[], None] = do_nothing


class RequestBodies:
    """Reads the request bodies of one HTTP port."""

    def __init__(self, limit_bytes: int, budget: RequestBytes) -> None:
        self._limit = limit_bytes
        self._budget = budget

    @asynccontextmanager
    async def read(
        self, receive: Receive, connection: HttpConnection, declared: bytes, tenant: str
    ) -> AsyncIterator[bytes | bytearray]:
        """Read a whole body as `receive` does. The body counts against the budget until the context is left."""
        body = await self.receive(receive, connection, declared, tenant)
        try:
            yield body.content
        finally:
            body.release()

    async def receive(self, receive: Receive, connection: HttpConnection, declared: bytes, tenant: str) -> Body:
        """Read a whole body. It counts against the budget of request bytes until the caller releases it.

        `declared`: the value of the content-length header, or empty. Raises Refused, and ConnectionResetError if the
        client disconnects before the body ends.
        """
        length = int(declared) if declared.isdigit() else None
        if length is not None and length > self._limit:
            raise self._too_large()
        content, more = await _part(receive)
        if not more:
            if len(content) > self._limit:
                raise self._too_large()
            return Body(content)
        reservation = await self._reserved(connection, self._limit if length is None else length, tenant)
        try:
            received = bytearray(content)
            while more:
                content, more = await _part(receive)
                reservation.received(len(content))
                received += content
                if len(received) > self._limit:
                    raise self._too_large()
            # A large body is not copied: allocating 16 MB would block the event loop for 5 to 10 ms.
            whole = received if len(received) >= UNCOPIED_BYTES else bytes(received)
            del received, content
            reservation.complete()
            self._budget.shrink(reservation, len(whole))
            return Body(whole, reservation.release)
        except BaseException:
            reservation.release()
            raise

    def _too_large(self) -> Refused:
        return Refused(413, "request_too_large", f"the body is larger than {self._limit} bytes")

    async def _reserved(self, connection: HttpConnection, size: int, tenant: str) -> Reservation:
        """Wait for a reservation of `size` bytes. Raises Refused if too many bodies wait or this body has waited too
        long, and ConnectionResetError if the client disconnects."""
        if self._budget.full(tenant):
            raise _busy()
        granted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def settle(outcome: bool) -> None:
            if not granted.done():
                granted.set_result(outcome)

        def too_slow() -> None:
            reservation.release()
            connection.refuse_body()

        def lost() -> None:
            settle(False)

        reservation = self._budget.reserve(tenant, id(connection), size, lambda: settle(True), too_slow)
        if reservation.granted:
            return reservation
        connection.watch_paused(lost)
        try:
            async with asyncio.timeout(GRANT_TIMEOUT_S):
                if not await granted:
                    raise ConnectionResetError
        except TimeoutError:
            reservation.release()
            raise _busy() from None
        except BaseException:
            reservation.release()
            raise
        finally:
            connection.unwatch(lost)
        return reservation


def _busy() -> Refused:
    message = "too many large requests are being received; send fewer at once, or try again"
    return Refused(503, "overloaded", message, [(b"retry-after", b"1")])


async def _part(receive: Receive) -> tuple[bytes, bool]:
    """Return the next part of the body, and whether more parts follow. Raises ConnectionResetError if the client
    disconnects."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionResetError
    return message["body"], message["more_body"]
