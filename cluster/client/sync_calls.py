"""The calls of a Client: unary calls with retries, and streams that are resumed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from cluster.client.answers import Chunk, StreamState
from cluster.client.attempts import StreamAttempts
from cluster.client.errors import UNREACHABLE, HeadraceError, from_rpc
from cluster.client.gateways import GatewayList
from cluster.client.options import ChannelOptions, new_request_id
from cluster.client.resume import Request
from cluster.v1.inference_pb2_grpc import InferenceStub

Response = TypeVar("Response")


class Stream(StreamState, Generic[Chunk]):
    """A streamed answer.

    Iterate over the stream to read the first choice's text. Iterate over `chunks()` to read every message of all
    choices. `text`, `finish_reason`, `usage`, `id`, `model` and `request_id` have the values received so far; the
    usage is received last. Leaving a `with` block, calling `cancel()` or dropping the stream object ends the call at
    the gateway.
    """

    def __init__(self, attempts: StreamAttempts, endpoint: str) -> None:
        """Initialize the stream of a started call. Errors name `endpoint`."""
        super().__init__(attempts.request_id)
        self._endpoint = endpoint
        self._attempts = attempts
        self._cancelled = threading.Event()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while True:
            text = self._record(self._next())
            if text:
                return text

    def chunks(self) -> Iterator[Chunk]:
        """Yield every chunk in the form of the API, including progress messages. Raises HeadraceError."""
        while True:
            try:
                chunk = self._next()
            except StopIteration:
                return
            self._record(chunk)
            yield chunk

    def _next(self) -> Chunk:
        attempts = self._attempts
        while True:
            try:
                chunk: Any = next(attempts.call)
            except grpc.RpcError as error:
                failed = from_rpc(error, endpoint=self._endpoint, request_id=self.request_id)
                if not self._resume(failed):
                    raise failed from None
                continue
            chunk = attempts.resumption.record(chunk)
            if chunk is not None:
                typed: Chunk = chunk
                return typed

    def _resume(self, failed: HeadraceError) -> bool:
        pause_s = self._attempts.pause_after(failed)
        if pause_s is None or self._cancelled.wait(pause_s):
            return False
        self._attempts.resume()
        if self._cancelled.is_set():
            self._attempts.call.cancel()
        return True

    def cancel(self) -> None:
        """End the call now. Does nothing if the call has ended."""
        self._cancelled.set()
        self._attempts.call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _connect(
    credentials: grpc.ChannelCredentials | None, arguments: Sequence[tuple[str, Any]], endpoint: str
) -> tuple[grpc.Channel, InferenceStub]:
    channel = (
        grpc.secure_channel(endpoint, credentials, options=arguments)
        if credentials
        else grpc.insecure_channel(endpoint, options=arguments)
    )
    return channel, InferenceStub(channel)


class BlockingCalls:
    """The calls of a Client, and the connections on which the calls run. Thread-safe."""

    def __init__(self, options: ChannelOptions) -> None:
        self._options = options
        # No bound method: with a reference cycle, a client that is dropped would keep its connections for a while.
        connect = partial(_connect, options.credentials(), options.channel_options())
        self.gateways = GatewayList(options.endpoints, connect)

    def close(self) -> None:
        """Close the connections and end all calls on the connections."""
        for channel in self.gateways.channels:
            channel.close()

    def unary(
        self,
        method: Callable[[InferenceStub], Callable[..., Response]],
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
                return method(self.gateways.stub)(request, timeout=time_left(), metadata=metadata)
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
        method: Callable[[InferenceStub], Callable[..., Iterator[Chunk]]],
        request: Request,
        timeout_s: float | None,
        request_id: str | None,
        headers: Mapping[str, str] | None,
    ) -> Stream[Chunk]:
        """Start a streamed call."""
        request_id = request_id or new_request_id()
        resumption, metadata = self._options.resumption(request, timeout_s), self._options.metadata(request_id, headers)
        attempts = StreamAttempts(self.gateways, method, resumption, request_id, metadata)
        attempts.start()
        return Stream(attempts, self._options.endpoint)
