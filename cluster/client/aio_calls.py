"""The calls of an AsyncClient: unary calls with retries, and streams that are resumed and share sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import grpc
from grpc import aio

from cluster.client.answers import Chunk, StreamState, text_chunk
from cluster.client.attempts import Method, StreamAttempts
from cluster.client.errors import UNREACHABLE, HeadraceError, cancelled, from_rpc
from cluster.client.gateways import GatewayList
from cluster.client.options import ChannelOptions, new_request_id
from cluster.client.resume import Request
from cluster.client.session import CALL_CANCELLED, CLIENT_CLOSED, MAX_REQUEST_BYTES, SessionCall, Sessions
from cluster.client.trace_context import TRACE_HEADERS
from cluster.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceAsyncStub

Response = TypeVar("Response")


class AsyncStream(StreamState, Generic[Chunk]):
    """A streamed answer.

    Iterate over the stream to read the first choice's text. Iterate over `chunks()` to read every message of all
    choices. `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` have the values received so far; the
    usage is received last. Leaving an `async with` block, calling `cancel()` or dropping the stream object ends the
    call at the gateway.
    """

    def __init__(self, attempts: _SessionAttempts, endpoint: str, on_end: Callable[[], None]) -> None:
        """Initialize the stream of a started call. Errors name `endpoint`. `on_end` is called once, at the end."""
        super().__init__(attempts.request_id)
        self._attempts = attempts
        self._endpoint = endpoint
        self._on_end: Callable[[], None] | None = on_end
        self._cancelled = False

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            text = self._record(await self._next())
            if text:
                return text

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Yield every received chunk as a `Chunk` message, also those with progress only. Raises HeadraceError."""
        while True:
            try:
                chunk = await self._next()
            except StopAsyncIteration:
                return
            self._record(chunk)
            if isinstance(chunk, str):
                whole: Any = text_chunk(self._attempts.resumption.request, chunk)
                whole.id, whole.model = self.id, self.model
                chunk = whole
            yield chunk

    async def _next(self) -> Chunk | str:
        attempts = self._attempts
        while True:
            try:
                chunk: Any = await attempts.call.read()
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
            except HeadraceError as error:
                failed = error
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # nobody cancelled the reader: gRPC reports in this way that the call itself was cancelled
                failed = cancelled(CALL_CANCELLED if self._cancelled else CLIENT_CLOSED, self.request_id)
            else:
                if chunk is aio.EOF:
                    self._finish()
                    raise StopAsyncIteration
                chunk = attempts.resumption.record(chunk)
                if chunk is None:
                    continue
                typed: Chunk | str = chunk
                return typed
            if not await self._resume(failed):
                self._finish()
                raise failed from None

    async def _resume(self, failed: HeadraceError) -> bool:
        pause_s = self._attempts.pause_after(failed)
        if pause_s is None or self._cancelled:
            return False
        await asyncio.sleep(pause_s)
        if self._cancelled:
            return False
        self._attempts.resume()
        return True

    def _finish(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def cancel(self) -> None:
        """End the call now. Does nothing if the call has ended."""
        self._cancelled = True
        self._attempts.call.cancel()
        self._finish()

    def __del__(self) -> None:
        if self._on_end is not None:  # dropped before the end: the session would continue to receive chunks
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


@dataclass(eq=False)
class _SessionAttempts(StreamAttempts):
    """The calls that serve one stream: the first call, then one call for each resume. Each call runs in a session, or
    is a plain gRPC stream if `sessions` is None."""

    sessions: Sessions | None

    @property
    def endpoint(self) -> str:
        """The endpoint of the gateway to which the current call was sent."""
        return self.call.endpoint if isinstance(self.call, SessionCall) else self._endpoint

    def _begin(self, request: Any, method: Method) -> Any:
        if self.sessions is None:
            return super()._begin(request, method)
        call = SessionCall(
            request,
            self.resumption.remaining_s,
            dict(self.metadata),
            lambda: super(_SessionAttempts, self)._begin(request, method),
            self.sessions,
        )
        self.sessions.start(call)
        return call


class AsyncCalls:
    """The calls of an AsyncClient, and the connections and sessions on which the calls run."""

    def __init__(self, options: ChannelOptions) -> None:
        self._options = options
        self._credentials = options.credentials()
        self._arguments = options.channel_options()
        self._reconnect_tasks: list[asyncio.Task[None]] = []
        self.gateways = GatewayList(options.endpoints, self._connect)
        self.sessions = Sessions(self.gateways, options)
        self.streams = 0
        """Number of streams that are running."""

    def _connect(self, endpoint: str) -> tuple[aio.Channel, InferenceAsyncStub]:
        channel = (
            aio.secure_channel(endpoint, self._credentials, options=self._arguments)
            if self._credentials
            else aio.insecure_channel(endpoint, options=self._arguments)
        )
        self._reconnect_tasks.append(asyncio.create_task(self._reconnect_early(channel)))
        return channel, InferenceStub(channel)

    async def close(self) -> None:
        """Close the connections and end all calls on the connections."""
        for task in self._reconnect_tasks:
            task.cancel()
        await asyncio.gather(*self._reconnect_tasks, return_exceptions=True)
        await self.sessions.close()
        for channel in self.gateways.channels:
            await channel.close()

    async def unary(
        self,
        method: Callable[[InferenceAsyncStub], Callable[..., Awaitable[Response]]],
        request: object,
        timeout_s: float | None,
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Make a unary call and return its response. If a gateway does not answer, try the next one. Raises
        HeadraceError."""
        request_id = request_id or new_request_id()
        time_left = self._options.time_left(timeout_s)
        for remaining in reversed(range(len(self._options.endpoints))):
            endpoint = self.gateways.endpoint
            try:
                metadata = self._options.metadata(request_id, headers)
                return await method(self.gateways.stub)(request, timeout=time_left(), metadata=metadata)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._options.endpoint, request_id=request_id)
            if failed.reason != UNREACHABLE:
                raise failed
            self.gateways.switch_from(endpoint)
            if not remaining or not self._options.retries:
                raise failed
        raise AssertionError("unreachable: there is at least one endpoint")

    def stream(
        self,
        method: Callable[[InferenceAsyncStub], Callable[..., AsyncIterable[Chunk]]],
        request: Request,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> AsyncStream[Chunk]:
        """Start a streamed call. While another stream is running, the call runs in a session."""
        request_id = request_id or new_request_id()
        resumption, metadata = self._options.resumption(request, timeout_s), self._options.metadata(request_id, headers)
        # headers belong to one call, but all calls of a session share the session's headers
        has_headers = bool(set(headers or ()).difference(TRACE_HEADERS))
        is_shared = self.streams and not has_headers and request.ByteSize() <= MAX_REQUEST_BYTES
        sessions = self.sessions if is_shared else None
        attempts = _SessionAttempts(self.gateways, method, resumption, request_id, metadata, sessions)
        attempts.start()
        self.streams += 1
        return AsyncStream(attempts, self._options.endpoint, self._stream_ended)

    def _stream_ended(self) -> None:
        self.streams -= 1

    async def _reconnect_early(self, channel: aio.Channel) -> None:
        """While streams are running, reconnect as soon as the connection to a draining gateway is lost.

        The streams of the draining gateway can then be resumed at once. Without this method, gRPC would reconnect only
        at the next call.
        """
        state = channel.get_state()
        while state is not grpc.ChannelConnectivity.SHUTDOWN:
            await channel.wait_for_state_change(state)
            state = channel.get_state(try_to_connect=bool(self.streams))
