"""The server: finds a call's handler, runs it in a task of its own, and turns how it ends into a status."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
import grpc.aio
import structlog

from cluster.http2.call import ServerCall
from cluster.http2.connection import Connection
from cluster.http2.connection_table import Held
from cluster.http2.limits import ServerLimits
from cluster.http2.listener import ConnectionAdmission, Listener, listening
from cluster.http2.messages import ENCODINGS, BadMessage, Metadata
from cluster.http2.read_slices import ReadTurns
from cluster.http2.request_body import Budget

log = structlog.get_logger("rpc")

_CODE = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class _Details:
    """What a generic handler looks at."""

    method: str
    invocation_metadata: Metadata


CLOSE_NOTIFY_S: Final = 0.1
"""So long a client may take to answer the end of TLS. gRPC's answers none, and sees no end before TCP's: without
this, asyncio lets it believe in the connection for half a minute."""


MAX_ECHO: Final = 256
"""Characters of what a caller has sent that an error repeats."""


class Gate(Protocol):
    """Decides about calls when their heads have come, before any more of their requests is taken."""

    async def admit(self, call: ServerCall) -> str | None:
        """The tenant whose budget the request counts against; None for a method that asks for no credential. Refuses
        by `call.abort`. Is asked again when a request came later than its head."""


NOTE_S: Final = 1.0
"""Of what many connections meet, one line in so long is logged."""


class Server:
    """Serves grpc's handlers. `add_generic_rpc_handlers` is what generated code calls."""

    def __init__(
        self,
        limits: ServerLimits | None = None,
        admission: ConnectionAdmission | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`admission`: the caps of the port, for a process that has several. Without a gate, connections have all that
        `limits` allow from the start. `budget`: see request_body.py."""
        self.limits = limits or ServerLimits()
        self._admission = admission or ConnectionAdmission()
        self.gate = gate
        self.budget = budget
        self._noted: dict[str, tuple[float, int]] = {}
        self.connections: set[Connection] = set()
        self.turns = ReadTurns()
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._listener: Listener | None = None
        self._empty = asyncio.Event()
        self._stopping = False

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """More methods."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Generated code tells the same methods this way too."""

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind and serve; the port. `shared`: other processes may bind it too. Raises OSError."""
        return await self.serve(listening(host, port, shared=shared), tls)

    async def serve(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> int:
        """Serve on a socket that `listening` gave; its port."""
        self._listener = Listener(listener, self._connection, self._admission, tls, CLOSE_NOTIFY_S)
        self._listener.start()
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """No new call; those under way get `grace_s` seconds, then UNAVAILABLE."""
        if self._listener is None:
            return
        self._stopping = True
        self._listener.close()
        for connection in list(self.connections):
            connection.leave()
        if self._calls():
            self._empty.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        tasks = [call.task for call in self._calls() if call.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        for connection in list(self.connections):
            connection.last_call()
            connection.close()

    def _connection(self, held: Held) -> Connection:
        age_s = self.limits.age_s * random.uniform(0.9, 1.1)  # noqa: S311 - spread, not secrecy
        return Connection(self, self.limits, age_s, held)

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Cut the connections for which it holds, with their calls; returns how many."""
        cut = [one.transport for one in self.connections if condition(one.transport)]
        for transport in cut:
            transport.abort()
        return len(cut)

    def _calls(self) -> list[ServerCall]:
        return [call for connection in self.connections for call in connection.calls.values()]

    # ---- called by connections

    def opened(self, call: ServerCall, unknown_encoding: str, problem: str, seconds: float | None) -> None:
        """A call's head has come. `problem`: what is wrong with it."""
        if unknown_encoding:
            call.set_trailing_metadata((("grpc-accept-encoding", ",".join(ENCODINGS)),))
            self._refuse(call, _CODE.UNIMPLEMENTED, f"grpc-encoding {unknown_encoding[:MAX_ECHO]} is not known")
            return
        if problem:
            self._refuse(call, _CODE.INVALID_ARGUMENT, problem)
            return
        handler = self._find(call)
        if handler is None:
            self._refuse(call, _CODE.UNIMPLEMENTED, f"there is no method {call.path[:MAX_ECHO]}")
            return
        loop = call.connection.loop
        call.serializer = handler.response_serializer
        if handler.request_streaming:
            call.deserializer = handler.request_deserializer
            call.body.streaming = True
            wait_s = seconds
        else:
            wait_s = self.limits.request_s if seconds is None else min(seconds, self.limits.request_s)
        if wait_s is not None:
            call.timer = loop.call_later(wait_s, self._out_of_time, call)
        call.task = loop.create_task(self._run(call, handler))

    def _refuse(self, call: ServerCall, code: grpc.StatusCode, details: str) -> None:
        call.finish(code, details)
        call.connection.charge_refusal()

    def bad_message(self, call: ServerCall, error: BadMessage) -> None:
        """What a client sent is no message, or too large."""
        call.finish(_CODE.RESOURCE_EXHAUSTED if error.too_large else _CODE.INTERNAL, str(error), at_once=True)
        if call.task is not None:
            call.task.cancel()

    def note(self, event: str, connection: Connection, reason: str) -> None:
        """Log what a connection has met, one line a second at most."""
        now = connection.loop.time()
        at, more = self._noted.get(event, (-NOTE_S, 0))
        if now - at < NOTE_S:
            self._noted[event] = (at, more + 1)
            return
        self._noted[event] = (now, 0)
        log.warning(event, peer=connection.peer, reason=reason, not_logged_before=more)

    def left(self) -> None:
        """A call or connection has ended."""
        if self._stopping and not self._calls():
            self._empty.set()

    # ---- handlers

    def _find(self, call: ServerCall) -> Any:
        details = _Details(call.path, call.invocation_metadata())
        for candidate in self._handlers:
            handler = candidate.service(details)  # type: ignore[arg-type]
            if handler is not None:
                return handler
        return None

    def _out_of_time(self, call: ServerCall) -> None:
        call.timed_out = True
        if call.task is None:
            return
        if call.task.done():
            call.connection.reset(call)  # its end waits for a client that does not read
        else:
            call.task.cancel()

    def _expect_end(self, call: ServerCall) -> None:
        """The request has come in time: from now on only the caller's deadline counts."""
        if call.timer is None:
            return
        loop, remaining_s = call.connection.loop, call.time_remaining()
        if remaining_s is None:
            call.timer.cancel()
        elif loop.time() + remaining_s > call.timer.when() + 0.01:
            call.timer.cancel()
            call.timer = loop.call_later(remaining_s, self._out_of_time, call)

    async def _admit(self, call: ServerCall) -> None:
        """Raises AbortError and BadMessage."""
        tenant = "" if self.gate is None else await self.gate.admit(call)
        if not call.closed:
            call.connection.admit(call, tenant)

    async def _request(self, call: ServerCall, handler: Any) -> Any:
        """What the handler gets, once the caller was let in. Raises AbortError, BadMessage."""
        await self._admit(call)
        if handler.request_streaming:
            return call
        late = not call.half_closed
        data = await call.whole_request()
        if late and self.gate is not None:
            await self.gate.admit(call)
        self._expect_end(call)
        if data is None:
            raise BadMessage("this method takes exactly one request message")
        try:
            return handler.request_deserializer(data)
        except Exception as error:  # whatever a deserializer of generated code raises
            raise BadMessage(f"the request does not deserialize: {error}") from None

    async def _run(self, call: ServerCall, handler: Any) -> None:
        try:
            request = await self._request(call, handler)
            if handler.response_streaming:
                behave = handler.stream_stream if handler.request_streaming else handler.unary_stream
                running = behave(request, call)
                if hasattr(running, "__aiter__"):
                    async for message in running:
                        await call.write(message)
                else:
                    await running
            else:
                behave = handler.stream_unary if handler.request_streaming else handler.unary_unary
                response = await behave(request, call)
                call.send(handler.response_serializer(response))
            call.finish()
        except grpc.aio.AbortError:
            call.finish()
            if not call.admitted:
                call.connection.charge_refusal()
        except BadMessage as error:
            call.connection.end_early(call, error)
        except asyncio.CancelledError:
            if call.timed_out:
                whole = call.request_whole or handler.request_streaming
                details = "deadline exceeded" if whole else "the request has not come in time"
                call.finish(_CODE.DEADLINE_EXCEEDED, details, at_once=True)
            elif self._stopping:
                call.finish(_CODE.UNAVAILABLE, "the gateway is stopping; call another", at_once=True)
            else:
                call.finish(_CODE.CANCELLED, "cancelled", at_once=True)
        except Exception:  # no traceback reaches a caller
            log.exception("unexpected", path=call.path)
            call.set_trailing_metadata(())
            call.finish(_CODE.UNKNOWN, "unexpected failure", at_once=True)
