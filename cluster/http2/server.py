"""The gRPC server: it finds the handler of a call, runs the handler in a task, and maps the outcome to a status."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

import grpc
import grpc.aio
import structlog

from cluster.http2.call import ServerCall
from cluster.http2.connection import Connection, ConnectionProtocol, ServerParts
from cluster.http2.connection_table import ConnectionSlot
from cluster.http2.lifetime import ConnectionLog
from cluster.http2.limits import Budget, ServerLimits
from cluster.http2.listener import ConnectionAdmission, Listener, listening_socket
from cluster.http2.messages import ENCODINGS, BadMessage, Metadata, RequestHead
from cluster.http2.read_slices import ReadTurns

log = structlog.get_logger("rpc")

_CODE = grpc.StatusCode
MAX_ECHO: Final = 256
"""Maximum number of characters of a caller's input that an error repeats."""
CLOSE_NOTIFY_S: Final = 0.1
"""Time limit for a client's answer to the TLS shutdown, in seconds. gRPC clients do not answer the shutdown and notice
only the end of TCP. Without this limit asyncio keeps the connection for 30 s."""


class _Details(NamedTuple):
    """The call details that a generic handler receives."""

    method: str
    invocation_metadata: Metadata


class Gate(Protocol):
    """The authorization of calls. A call is authorized when its headers have arrived, before its request is read."""

    async def admit(self, call: ServerCall) -> str | None:
        """Return the tenant whose budget the request counts against; None for a method that needs no credential.

        The gate refuses a call with `call.abort`. The server calls `admit` when the call's headers have arrived. If the
        request is incomplete then, the server calls `admit` again when the request is complete.
        """


class CallRunner:
    """Runs the handlers of a server's calls, each call in a task of its own."""

    def __init__(self, request_s: float, gate: Gate | None) -> None:
        """`request_s`: time limit in seconds to receive the request of a call that takes one message."""
        self._gate = gate
        self._request_s = request_s
        self._handlers: list[grpc.GenericRpcHandler] = []
        self.stopping = False

    def add(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add the handlers of a service's methods."""
        self._handlers += handlers

    def stop(self) -> None:
        """From now on, end every cancelled call with the status UNAVAILABLE."""
        self.stopping = True

    def start(self, call: ServerCall, head: RequestHead) -> None:
        """Start a call whose head has arrived, or refuse the call."""
        if head.encoding not in ENCODINGS:
            call.set_trailing_metadata((("grpc-accept-encoding", ",".join(ENCODINGS)),))
            self._refuse(call, _CODE.UNIMPLEMENTED, f"grpc-encoding {head.encoding[:MAX_ECHO]} is not supported")
            return
        if head.problem:
            self._refuse(call, _CODE.INVALID_ARGUMENT, head.problem)
            return
        handler = self._find_handler(call)
        if handler is None:
            self._refuse(call, _CODE.UNIMPLEMENTED, f"there is no method {call.path[:MAX_ECHO]}")
            return
        limit_s = head.timeout_s
        if handler.request_streaming:
            call.request.stream(handler.request_deserializer)
        else:
            limit_s = self._request_s if limit_s is None else min(limit_s, self._request_s)
        call.run(self._run(call, handler), limit_s, handler.response_serializer)

    def _refuse(self, call: ServerCall, code: grpc.StatusCode, details: str) -> None:
        call.finish(code, details)
        call.owner.charge_refusal()

    def _find_handler(self, call: ServerCall) -> Any:
        details = _Details(call.path, call.invocation_metadata())
        for candidate in self._handlers:
            handler = candidate.service(details)  # type: ignore[arg-type]
            if handler is not None:
                return handler
        return None

    async def _request(self, call: ServerCall, handler: Any) -> Any:
        """Wait until the gate admits the call, and return the request as the handler's argument. Raises AbortError,
        BadMessage."""
        tenant = "" if self._gate is None else await self._gate.admit(call)
        if not call.closed:
            call.owner.admit(call, tenant)
        if handler.request_streaming:
            return call.request
        late = not call.request.half_closed
        data = await call.request.only_message()
        if late and self._gate is not None:
            await self._gate.admit(call)
        if call.running is not None:
            call.running.limit(call.time_remaining())  # the request is complete: only the caller's deadline is left
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
                if response is not None:  # otherwise the handler has written its response
                    call.send(handler.response_serializer(response))
            call.finish()
        except grpc.aio.AbortError:
            call.finish()
            if not call.admitted:
                call.owner.charge_refusal()
        except BadMessage as error:
            call.owner.end_early(call, error)
        except asyncio.CancelledError:
            if call.running is not None and call.running.timed_out:
                whole = call.request.complete or handler.request_streaming
                details = "deadline exceeded" if whole else "the request did not arrive in time"
                call.finish(_CODE.DEADLINE_EXCEEDED, details, at_once=True)
            elif self.stopping:
                call.finish(_CODE.UNAVAILABLE, "the gateway is stopping; call another", at_once=True)
            else:
                call.finish(_CODE.CANCELLED, "cancelled", at_once=True)
        except Exception:  # callers must not see a traceback
            log.exception("rpc.failed", path=call.path)
            call.set_trailing_metadata(())
            call.finish(_CODE.UNKNOWN, "unexpected failure", at_once=True)


class Server:
    """A server that runs grpc's handlers. Generated code registers handlers with `add_generic_rpc_handlers`."""

    def __init__(
        self,
        limits: ServerLimits | None = None,
        admission: ConnectionAdmission | None = None,
        gate: Gate | None = None,
        budget: Budget | None = None,
    ) -> None:
        """`admission`: the connection pool of the port and the log of refused connections; None: the server creates
        both. `gate`: authorizes calls; without a gate, connections have the full `limits` from the start. `budget`:
        limits the bytes of all requests that are being received."""
        self.limits = limits or ServerLimits()
        self.connections: set[Connection] = set()
        self._runner = runner = CallRunner(self.limits.request_s, gate)
        self._parts = ServerParts(
            self.limits,
            budget,
            gate is not None,
            ReadTurns(),
            ConnectionLog(),
            self.connections,
            runner.start,
            self._on_call_end,
        )
        self._admission = admission or ConnectionAdmission()
        self._listener: Listener | None = None
        self._empty = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Add the handlers of a service's methods."""
        self._runner.add(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Do nothing: generated code registers the same methods here a second time."""

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None, *, shared: bool = False) -> int:
        """Bind a socket, serve on it and return the port. `shared`: whether other processes may bind the port too.
        Raises OSError."""
        return await self.serve(listening_socket(host, port, shared=shared), tls)

    async def serve(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> int:
        """Serve on a socket from `listening_socket` and return the socket's port."""
        self._listener = Listener(listener, self._protocol, self._admission, tls, CLOSE_NOTIFY_S)
        self._listener.start()
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait `grace_s` seconds for running calls, and end the rest with UNAVAILABLE."""
        if self._listener is None:
            return
        self._runner.stop()
        self._listener.close()
        for connection in list(self.connections):
            connection.lifetime.leave()
        if self._calls():
            self._empty.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        tasks = [call.running.task for call in self._calls() if call.running is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        for connection in list(self.connections):
            connection.lifetime.refuse_new_calls()
            connection.lifetime.close()

    def _protocol(self, slot: ConnectionSlot) -> ConnectionProtocol:
        age_s = self.limits.age_s * random.uniform(0.9, 1.1)  # noqa: S311 - spread, not secrecy
        return ConnectionProtocol(self._parts, age_s, slot)

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Abort the connections whose transport meets the condition. Returns the number of aborted connections."""
        transports = [c.transport for c in self.connections if condition(c.transport)]
        for transport in transports:
            transport.abort()
        return len(transports)

    def _calls(self) -> list[ServerCall]:
        return [call for connection in self.connections for call in connection.calls.by_stream.values()]

    def _on_call_end(self) -> None:
        """Handle the end of a call. After the end of the last call, wake a waiting `stop`."""
        if self._runner.stopping and not self._calls():
            self._empty.set()
