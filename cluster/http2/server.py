"""The gRPC server, which finds the handler of a call, runs the handler in a task, and maps the outcome to a status."""

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
from cluster.http2.connection_table import ConnectionSlot
from cluster.http2.limits import ServerLimits
from cluster.http2.listener import ConnectionAdmission, Listener, listening_socket
from cluster.http2.messages import ENCODINGS, BadMessage, Metadata
from cluster.http2.read_slices import ReadTurns
from cluster.http2.request_body import Budget

log = structlog.get_logger("rpc")

_CODE = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class _Details:
    """The call details that a generic handler receives."""

    method: str
    invocation_metadata: Metadata


CLOSE_NOTIFY_S: Final = 0.1
"""Time limit for a client's answer to the TLS shutdown, in seconds. gRPC clients do not answer the shutdown and notice
only the end of TCP. Without this limit asyncio keeps the connection for 30 s."""


MAX_ECHO: Final = 256
"""Maximum number of characters of a caller's input that an error repeats."""


class Gate(Protocol):
    """The authorization of calls. A call is authorized when its headers have arrived, before the rest of the request is
    read."""

    async def admit(self, call: ServerCall) -> str | None:
        """Return the tenant whose budget the request counts against; None for a method that needs no credential.

        The gate refuses a call by `call.abort`. The server calls `admit` again if the request arrived later than the
        headers."""


NOTE_S: Final = 1.0
"""Minimum interval in seconds between two log lines about one kind of event, for all connections together."""


class Server:
    """A server that runs grpc's handlers. Generated code registers handlers by `add_generic_rpc_handlers`."""

    def __init__(
        self,
        limits: ServerLimits | None = None,
        admission: ConnectionAdmission | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`admission`: the connection pool of the port, for a process with several ports. `gate`: authorizes calls;
        without a gate, connections have the full `limits` from the start. `budget`: see request_body.py."""
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
        """Add the handlers of a service's methods."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Do nothing: generated code registers the same methods here a second time."""

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind a socket, serve on it and return the port. `shared`: other processes may bind the port too. Raises
        OSError."""
        return await self.serve(listening_socket(host, port, shared=shared), tls)

    async def serve(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> int:
        """Serve on a socket from `listening_socket` and return the socket's port."""
        self._listener = Listener(listener, self._connection, self._admission, tls, CLOSE_NOTIFY_S)
        self._listener.start()
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give running calls `grace_s` seconds to end, and then end the remaining calls with
        UNAVAILABLE."""
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
            connection.refuse_new_calls()
            connection.close()

    def _connection(self, held: ConnectionSlot) -> Connection:
        age_s = self.limits.age_s * random.uniform(0.9, 1.1)  # noqa: S311 - spread, not secrecy
        return Connection(self, self.limits, age_s, held)

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Abort the connections for whose transport `condition` is true, with their calls. Returns the number of
        connections."""
        transports = [c.transport for c in self.connections if condition(c.transport)]
        for transport in transports:
            transport.abort()
        return len(transports)

    def _calls(self) -> list[ServerCall]:
        return [call for connection in self.connections for call in connection.calls.values()]

    # ---- called by connections

    def start_call(self, call: ServerCall, unknown_encoding: str, problem: str, seconds: float | None) -> None:
        """Start a call whose headers have arrived. `problem`: the error in the headers, empty if the headers are
        valid."""
        if unknown_encoding:
            call.set_trailing_metadata((("grpc-accept-encoding", ",".join(ENCODINGS)),))
            self._refuse(call, _CODE.UNIMPLEMENTED, f"grpc-encoding {unknown_encoding[:MAX_ECHO]} is not supported")
            return
        if problem:
            self._refuse(call, _CODE.INVALID_ARGUMENT, problem)
            return
        handler = self._find_handler(call)
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
            call.timer = loop.call_later(wait_s, self._on_timeout, call)
        call.task = loop.create_task(self._run(call, handler))

    def _refuse(self, call: ServerCall, code: grpc.StatusCode, details: str) -> None:
        call.finish(code, details)
        call.connection.charge_refusal()

    def bad_message(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed or too large."""
        call.finish(_CODE.RESOURCE_EXHAUSTED if error.too_large else _CODE.INTERNAL, str(error), at_once=True)
        if call.task is not None:
            call.task.cancel()

    def note(self, event: str, connection: Connection, reason: str) -> None:
        """Log an event of a connection, with at most one line a second for each kind of event."""
        now = connection.loop.time()
        at, more = self._noted.get(event, (-NOTE_S, 0))
        if now - at < NOTE_S:
            self._noted[event] = (at, more + 1)
            return
        self._noted[event] = (now, 0)
        log.warning(event, peer=connection.peer, reason=reason, not_logged_before=more)

    def call_ended(self) -> None:
        """Handle the end of a call. After the last call, `stop` no longer waits."""
        if self._stopping and not self._calls():
            self._empty.set()

    # ---- handlers

    def _find_handler(self, call: ServerCall) -> Any:
        details = _Details(call.path, call.invocation_metadata())
        for candidate in self._handlers:
            handler = candidate.service(details)  # type: ignore[arg-type]
            if handler is not None:
                return handler
        return None

    def _on_timeout(self, call: ServerCall) -> None:
        call.timed_out = True
        if call.task is None:
            return
        if call.task.done():
            call.connection.reset(call)  # the status waits for a client that does not read
        else:
            call.task.cancel()

    def _replace_timer(self, call: ServerCall) -> None:
        """Replace the time limit of the request by the caller's deadline, after the request is complete."""
        if call.timer is None:
            return
        loop, remaining_s = call.connection.loop, call.time_remaining()
        if remaining_s is None:
            call.timer.cancel()
        elif loop.time() + remaining_s > call.timer.when() + 0.01:
            call.timer.cancel()
            call.timer = loop.call_later(remaining_s, self._on_timeout, call)

    async def _admit(self, call: ServerCall) -> None:
        """Let the gate admit or refuse the call. Raises AbortError and BadMessage."""
        tenant = "" if self.gate is None else await self.gate.admit(call)
        if not call.closed:
            call.connection.admit(call, tenant)

    async def _request(self, call: ServerCall, handler: Any) -> Any:
        """Wait until the caller is admitted, and return the request argument for the handler. Raises AbortError,
        BadMessage."""
        await self._admit(call)
        if handler.request_streaming:
            return call
        late = not call.half_closed
        data = await call.whole_request()
        if late and self.gate is not None:
            await self.gate.admit(call)
        self._replace_timer(call)
        if data is None:
            raise BadMessage("this method takes exactly one request message")
        try:
            return handler.request_deserializer(data)
        except Exception as error:  # deserializers of generated code raise many types
            raise BadMessage(f"cannot deserialize the request: {error}") from None

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
                details = "deadline exceeded" if whole else "the request did not arrive in time"
                call.finish(_CODE.DEADLINE_EXCEEDED, details, at_once=True)
            elif self._stopping:
                call.finish(_CODE.UNAVAILABLE, "the gateway is stopping; call another", at_once=True)
            else:
                call.finish(_CODE.CANCELLED, "cancelled", at_once=True)
        except Exception:  # callers must not see a traceback
            log.exception("unexpected", path=call.path)
            call.set_trailing_metadata(())
            call.finish(_CODE.UNKNOWN, "unexpected failure", at_once=True)
