"""Concurrent streams share one Inference.Session, so that the gateway can send chunks of several calls in one message.

AsyncClient uses a session for a stream that begins while another stream is running. If the connection is old or the
gateway stops, a session refuses new calls, and ends when its last running call has ended. New and refused calls then go
to another session. If a gateway does not support sessions, calls are plain streams.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc import aio

from cluster.client.errors import UNREACHABLE, HeadraceError, cancelled, from_rpc, from_status
from cluster.client.gateways import GatewayList
from cluster.client.options import ChannelOptions
from cluster.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceAsyncStub

DEADLINE_GRACE_S = 1.0
"""Seconds after a call's deadline in which the client still waits for the gateway to report DEADLINE_EXCEEDED."""
MAX_MOVES = 3
MAX_BATCH, MAX_BATCH_BYTES = 100, 48 << 10
"""Largest number and largest total bytes of the requests in one message. Every gateway accepts messages of 64 KiB."""
MAX_REQUEST_BYTES = 1 << 20
"""Greatest size, in bytes, of a request in a session. A message that is too large for the gateway ends its session."""
CALL_CANCELLED, CLIENT_CLOSED = "the call was cancelled", "the client was closed"

Request = pb.ChatRequest | pb.CompleteRequest | pb.ResumeRequest


class SessionCall:
    """A call in a session, with the methods `read` and `cancel` of a gRPC stream.

    `read` returns a chunk, or a str if the gateway has sent only the next text of choice 0.
    """

    def __init__(
        self,
        request: Request,
        timeout_s: float | None,
        metadata: Mapping[str, str],
        open_stream: Callable[[], Any],
        sessions: Sessions,
    ) -> None:
        """Prepare a call. `metadata` has the call's request id and trace context.

        `open_stream` starts the same call as a plain stream, for gateways that do not support sessions.
        """
        self.request = request
        self.request_id = metadata["x-request-id"]
        self.traceparent = metadata.get("traceparent", "")
        self.tracestate = metadata.get("tracestate", "")
        self.deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self.endpoint = ""
        """Endpoint of the gateway to which the call's session is connected."""
        self.answered = False
        self.moves = 0
        self.cancel_in_session: Callable[[], bool] = lambda: False
        """Ends the call in its session. Returns False if the call has ended or is in no session."""
        self._open_stream = open_stream
        self._stream: Any = None
        self._sessions = sessions
        self._inbox: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, or None if the call has no deadline."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()

    async def read(self) -> Any:
        """Return the next chunk or text, or aio.EOF at the end. Raises HeadraceError.

        If the session was lost and the call was restarted as a plain stream, later errors are raised as grpc.RpcError.
        """
        while not self._inbox and self._stream is None:
            self._waiter = asyncio.get_running_loop().create_future()
            remaining_s = self.remaining_s
            try:
                async with asyncio.timeout(None if remaining_s is None else max(remaining_s, 0) + DEADLINE_GRACE_S):
                    await self._waiter
            except TimeoutError:
                self.cancel()
                raise HeadraceError(
                    "DEADLINE_EXCEEDED", "the call did not end before its deadline", code="DEADLINE_EXCEEDED"
                ) from None
        if self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, HeadraceError):
                raise item
            return item
        return await self._stream.read()

    def cancel(self) -> None:
        """End the call now; a reader gets the error CANCELLED. Does nothing if the call has ended."""
        if self.cancel_in_session():
            self._inbox.clear()
            self.put(cancelled(CALL_CANCELLED, self.request_id))
        if self._stream is not None:
            self._stream.cancel()

    def put(self, item: Any) -> None:
        """Queue an item from the session for the reader."""
        self._inbox.append(item)
        self._wake()

    def restart_as_stream(self) -> None:
        """Start the call again, as a plain stream."""
        self._stream = self._open_stream()
        self._wake()

    def restart_in_session(self) -> bool:
        """Start the call again, in another session.

        Does nothing and returns False if a part of the answer was already received, or if the call was already
        restarted MAX_MOVES times.
        """
        if self.answered or self.moves >= MAX_MOVES:
            return False
        self.moves += 1
        self._sessions.start(self)
        return True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Session:
    """An Inference.Session stream and the calls in the stream."""

    def __init__(self, endpoint: str, stub: InferenceAsyncStub, options: ChannelOptions, sessions: Sessions) -> None:
        self.endpoint = endpoint
        self._options = options
        self._calls: dict[int, SessionCall] = {}
        self._numbers = itertools.count(1)
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._next: pb.SessionRequest | None = None
        begin: Any = stub.Session  # the type stubs declare only the form with a request iterator
        self._stream = begin(metadata=options.session_metadata())
        self._sessions = sessions
        self._task = asyncio.create_task(self._run())

    def start(self, call: SessionCall) -> None:
        """Queue the message that starts a call."""
        number = next(self._numbers)
        self._calls[number] = call
        call.endpoint = self.endpoint
        remaining_s = call.remaining_s
        start = pb.SessionStart(
            call_id=number,
            deadline_ms=0 if remaining_s is None else max(math.ceil(remaining_s * 1000), 1),
            request_id=call.request_id,
            traceparent=call.traceparent,
            tracestate=call.tracestate,
        )
        if isinstance(call.request, pb.ChatRequest):
            start.chat.CopyFrom(call.request)
        elif isinstance(call.request, pb.ResumeRequest):
            start.resume.CopyFrom(call.request)
        else:
            start.complete.CopyFrom(call.request)
        call.cancel_in_session = lambda: self._cancel(number)
        self._outbox.put_nowait(pb.SessionRequest(start=start))

    def _cancel(self, number: int) -> bool:
        if self._calls.pop(number, None) is None:
            return False
        self._outbox.put_nowait(pb.SessionRequest(cancel=pb.SessionCancel(call_id=number)))
        return True

    async def close(self) -> None:
        """End the session's stream and all calls in the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write())
        error: grpc.RpcError | None = None
        try:
            while (message := await self._stream.read()) is not aio.EOF:
                for event in message.events:
                    self._dispatch(event)
        except grpc.RpcError as broken:
            error = broken
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._stream.cancel()
            self._sessions.forget(self)
            self._end_calls(error)

    async def _write(self) -> None:
        """Send queued requests in batches, because each write to the stream must pass through gRPC's threads."""
        while True:
            message = self._next or await self._outbox.get()
            self._next, bytes_left = None, MAX_BATCH_BYTES - message.ByteSize()
            while len(message.more) < MAX_BATCH and not self._outbox.empty():
                more = self._outbox.get_nowait()
                bytes_left -= more.ByteSize()
                if bytes_left < 0:  # a request near the gateway's message limit must be sent alone
                    self._next = more
                    break
                message.more.append(more)
            await self._stream.write(message)

    def _dispatch(self, event: pb.SessionEvent) -> None:
        number = event.call_id
        call = self._calls.get(number)
        if call is None:
            return  # cancelled by the client while the event was in transit
        if event.status:
            del self._calls[number]
            self._fail_call(call, event.status)
            return
        call.answered = True
        if event.text:
            call.put(event.text)
            return
        chunk = event.chat if event.HasField("chat") else event.complete
        call.put(chunk)
        if chunk.HasField("usage"):
            del self._calls[number]
            call.put(aio.EOF)

    def _fail_call(self, call: SessionCall, packed: bytes) -> None:
        try:
            error = from_status(status_pb2.Status.FromString(packed), request_id=call.request_id)
        except DecodeError:
            error = HeadraceError("INTERNAL", "the gateway sent a malformed google.rpc.Status", code="INTERNAL")
        if error.code == "UNAVAILABLE" and error.reason == "NO_WORKER" and error.retry_after_s == 0:
            self._sessions.retire(self)
            if call.restart_in_session():
                return
        call.put(error)

    def _end_calls(self, error: grpc.RpcError | None) -> None:
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            if self._sessions.closed:
                call.put(cancelled(CLIENT_CLOSED, call.request_id))
            elif error is not None and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                call.restart_as_stream()
            elif error is not None:
                if call.answered or not self._options.retries:
                    failed = from_rpc(error, endpoint=self._options.endpoint, request_id=call.request_id)
                    if failed.code == "RESOURCE_EXHAUSTED":  # of one request; for the others, their stream is lost
                        failed.reason, failed.code = UNREACHABLE, "UNAVAILABLE"
                    call.put(failed)
                else:
                    call.restart_as_stream()  # gRPC itself retries plain streams
            elif not call.restart_in_session():
                call.put(HeadraceError(UNREACHABLE, "the session ended before the call", code="UNAVAILABLE"))


class Sessions:
    """The sessions of a client. New calls go to the newest session. A session is opened on first use."""

    def __init__(self, gateways: GatewayList[aio.Channel, InferenceAsyncStub], options: ChannelOptions) -> None:
        self._gateways = gateways
        self._options = options
        self._newest: _Session | None = None
        self._running: set[_Session] = set()
        self.closed = False

    def start(self, call: SessionCall) -> None:
        """Start a call in the newest session. If the client was closed, the call ends with the error CANCELLED."""
        if self.closed:
            call.put(cancelled(CLIENT_CLOSED, call.request_id))
            return
        endpoint = self._gateways.endpoint
        if self._newest is None or self._newest.endpoint != endpoint:
            self._newest = _Session(endpoint, self._gateways.stub, self._options, self)
            self._running.add(self._newest)
        self._newest.start(call)

    def retire(self, session: _Session) -> None:
        """Start no more calls in a session, because its gateway accepts no more."""
        if self._newest is session:
            self._newest = None

    def forget(self, session: _Session) -> None:
        """Drop a session that has ended."""
        self.retire(session)
        self._running.discard(session)

    async def close(self) -> None:
        """End all sessions of the client, and their calls with the error CANCELLED."""
        self.closed = True
        await asyncio.gather(*(session.close() for session in tuple(self._running)))
