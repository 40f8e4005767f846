"""The server: finds a call's handler, runs it in a task of its own, and turns how it ends into a status."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import structlog

from cluster.rpc.connection import Connection
from cluster.rpc.connection_table import Held
from cluster.rpc.limits import Limits
from cluster.rpc.listener import Admission, Listener, listening
from cluster.rpc.messages import ENCODINGS, BadMessage, Metadata
from cluster.rpc.read_turns import ReadTurns
from cluster.rpc.rpc import Rpc

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


class Server:
    """Serves grpc's handlers. `add_generic_rpc_handlers` is what generated code calls."""

    def __init__(self, limits: Limits | None = None, admission: Admission | None = None) -> None:
        """`admission`: the caps of the port, for a process that has several."""
        self.limits = limits or Limits()
        self._admission = admission or Admission()
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

    def _calls(self) -> list[Rpc]:
        return [call for connection in self.connections for call in connection.calls.values()]

    # ---- called by connections

    def opened(self, call: Rpc, unknown_encoding: str, problem: str, seconds: float | None) -> None:
        """A call's head has come. `problem`: what is wrong with it."""
        if unknown_encoding:
            call.set_trailing_metadata((("grpc-accept-encoding", ",".join(ENCODINGS)),))
            call.finish(_CODE.UNIMPLEMENTED, f"grpc-encoding {unknown_encoding} is not known")
            return
        if problem:
            call.finish(_CODE.INVALID_ARGUMENT, problem)
            return
        handler = self._find(call)
        if handler is None:
            call.finish(_CODE.UNIMPLEMENTED, f"there is no method {call.path}")
            return
        loop = call.connection.loop
        wait_s = self.limits.request_s if seconds is None and not handler.request_streaming else seconds
        if wait_s is not None:
            call.timer = loop.call_later(wait_s, self._out_of_time, call)
        call.serializer = handler.response_serializer
        if handler.request_streaming:
            call.deserializer = handler.request_deserializer
            call.task = loop.create_task(self._run(call, handler, call))
        else:
            call.handler = handler

    def half_closed(self, call: Rpc) -> None:
        """The whole request of a call has come."""
        handler = call.handler
        if handler is None:
            return
        data = call.take_request()
        if data is None:
            call.finish(_CODE.INTERNAL, "this method takes exactly one request message")
            return
        if call.timer is not None and call.time_remaining() is None:
            call.timer.cancel()
        try:
            request = handler.request_deserializer(data)
        except Exception as error:  # whatever a deserializer of generated code raises
            call.finish(_CODE.INTERNAL, f"the request does not deserialize: {error}")
            return
        call.task = call.connection.loop.create_task(self._run(call, handler, request))

    def bad_message(self, call: Rpc, error: BadMessage) -> None:
        """What a client sent is no message, or too large."""
        call.finish(_CODE.RESOURCE_EXHAUSTED if error.too_large else _CODE.INTERNAL, str(error), at_once=True)
        if call.task is not None:
            call.task.cancel()

    def left(self) -> None:
        """A call or connection has ended."""
        if self._stopping and not self._calls():
            self._empty.set()

    # ---- handlers

    def _find(self, call: Rpc) -> Any:
        details = _Details(call.path, call.invocation_metadata())
        for candidate in self._handlers:
            handler = candidate.service(details)  # type: ignore[arg-type]
            if handler is not None:
                return handler
        return None

    def _out_of_time(self, call: Rpc) -> None:
        call.timed_out = True
        if call.task is None:
            call.finish(_CODE.DEADLINE_EXCEEDED, "the request has not come in time")
        elif call.task.done():
            call.connection.reset(call)  # its end waits for a client that does not read
        else:
            call.task.cancel()

    async def _run(self, call: Rpc, handler: Any, request: Any) -> None:
        try:
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
        except asyncio.CancelledError:
            if call.timed_out:
                call.finish(_CODE.DEADLINE_EXCEEDED, "deadline exceeded", at_once=True)
            elif self._stopping:
                call.finish(_CODE.UNAVAILABLE, "the gateway is stopping; call another", at_once=True)
            else:
                call.finish(_CODE.CANCELLED, "cancelled", at_once=True)
        except Exception:  # no traceback reaches a caller
            log.exception("unexpected", path=call.path)
            call.set_trailing_metadata(())
            call.finish(_CODE.UNKNOWN, "unexpected failure", at_once=True)
