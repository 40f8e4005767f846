"""Several calls at once share one Inference.Session: the gateway then sends all their pieces of a moment together.

AsyncClient uses this by itself from the second stream under way on. A session that takes no more calls (its
connection is old, or its gateway stops) ends with its last one; new calls, and those it refused, go to another. A
gateway that does not know sessions gets plain streams.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2
from grpc import aio

from cluster.client.errors import HeadraceError, from_rpc, from_status
from cluster.client.gateways import GatewayList
from cluster.client.options import ChannelOptions
from cluster.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from cluster.v1.inference_pb2_grpc import InferenceAsyncStub

GRACE_S = 1.0
"""How much later than the gateway the client itself gives a call up."""
MAX_MOVES = 3
TOGETHER, TOGETHER_BYTES = 100, 48 << 10
"""Requests that go out together are so many at most, and have so many bytes in all: less than any gateway's bound on a
message (64 KiB at least)."""

Request = pb.ChatRequest | pb.CompleteRequest | pb.ResumeRequest


class SessionCall:
    """One call of a session, read like a gRPC stream: chunks, or a plain str for the next text of choice 0."""

    def __init__(
        self, request: Request, timeout_s: float | None, request_id: str, plain: Callable[[], Any], sessions: Sessions
    ) -> None:
        """`plain` makes the same call as a stream of its own, for gateways without sessions."""
        self.request = request
        self.request_id = request_id
        self.deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        self.asked = ""
        """The gateway whose session has it."""
        self.begun = False
        self.moves = 0
        self.leave: Callable[[], None] = lambda: None
        self._plain = plain
        self._stream: Any = None
        self._sessions = sessions
        self._inbox: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def left_s(self) -> float | None:
        """Seconds to the deadline."""
        return None if self.deadline is None else self.deadline - asyncio.get_running_loop().time()

    async def read(self) -> Any:
        """The next chunk or text, or aio.EOF. Raises HeadraceError, or grpc.RpcError from a plain stream."""
        while not self._inbox and self._stream is None:
            self._waiter = asyncio.get_running_loop().create_future()
            left_s = self.left_s
            try:
                async with asyncio.timeout(None if left_s is None else max(left_s, 0) + GRACE_S):
                    await self._waiter
            except TimeoutError:
                self.cancel()
                raise HeadraceError(
                    "DEADLINE_EXCEEDED", "no end of the call came in time", code="DEADLINE_EXCEEDED"
                ) from None
        if self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, HeadraceError):
                raise item
            return item
        return await self._stream.read()

    def cancel(self) -> None:
        """End the call now; nothing happens when it has ended."""
        self.leave()
        if self._stream is not None:
            self._stream.cancel()

    def put(self, item: Any) -> None:
        """The session has something for this call."""
        self._inbox.append(item)
        self._tell()

    def go_alone(self) -> None:
        """Begin anew as a stream of its own."""
        self._stream = self._plain()
        self._tell()

    def move(self) -> bool:
        """Begin anew in another session; False when something has come already, or it has moved often enough."""
        if self.begun or self.moves >= MAX_MOVES:
            return False
        self.moves += 1
        self._sessions.start(self)
        return True

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Session:
    """One stream and the calls on it."""

    def __init__(
        self, endpoint: str, stub: InferenceAsyncStub, options: ChannelOptions, on_end: Callable[[_Session], None]
    ) -> None:
        self.endpoint = endpoint
        self._options = options
        self._calls: dict[int, SessionCall] = {}
        self._numbers = itertools.count(1)
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._next: pb.SessionRequest | None = None
        begin: Any = stub.Session  # the stubs know only the style with a request iterator
        self._stream = begin(metadata=options.metadata("", None)[1:])
        self._on_end = on_end
        self._task = asyncio.create_task(self._run())

    def start(self, call: SessionCall) -> None:
        """Send a call's start."""
        number = next(self._numbers)
        self._calls[number] = call
        call.asked = self.endpoint
        left_s = call.left_s
        start = pb.SessionStart(
            call_id=number,
            deadline_ms=0 if left_s is None else max(math.ceil(left_s * 1000), 1),
            request_id=call.request_id,
        )
        if isinstance(call.request, pb.ChatRequest):
            start.chat.CopyFrom(call.request)
        elif isinstance(call.request, pb.ResumeRequest):
            start.resume.CopyFrom(call.request)
        else:
            start.complete.CopyFrom(call.request)
        call.leave = lambda: self._cancel(number)
        self._outbox.put_nowait(pb.SessionRequest(start=start))

    def _cancel(self, number: int) -> None:
        if self._calls.pop(number, None) is not None:
            self._outbox.put_nowait(pb.SessionRequest(cancel=pb.SessionCancel(call_id=number)))

    async def close(self) -> None:
        """End the stream and all calls on it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        writer = asyncio.create_task(self._write())
        error: grpc.RpcError | None = None
        try:
            while (message := await self._stream.read()) is not aio.EOF:
                for event in message.events:
                    self._take(event)
        except grpc.RpcError as broken:
            error = broken
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._stream.cancel()
            self._on_end(self)
            self._give_up(error)

    async def _write(self) -> None:
        """A write takes a turn through gRPC's own threads, so what has gathered since the last goes out in one."""
        while True:
            message = self._next or await self._outbox.get()
            self._next, room = None, TOGETHER_BYTES - message.ByteSize()
            while len(message.more) < TOGETHER and not self._outbox.empty():
                more = self._outbox.get_nowait()
                room -= more.ByteSize()
                if room < 0:  # a message that only just fits the gateway's bound must go alone
                    self._next = more
                    break
                message.more.append(more)
            await self._stream.write(message)

    def _take(self, event: pb.SessionEvent) -> None:
        number = event.call_id
        call = self._calls.get(number)
        if call is None:
            return  # cancelled here while the event was on its way
        if event.status:
            del self._calls[number]
            self._refused(call, event.status)
            return
        call.begun = True
        if event.text:
            call.put(event.text)
            return
        chunk = event.chat if event.HasField("chat") else event.complete
        call.put(chunk)
        if chunk.HasField("usage"):
            del self._calls[number]
            call.put(aio.EOF)

    def _refused(self, call: SessionCall, packed: bytes) -> None:
        try:
            error = from_status(status_pb2.Status.FromString(packed), request_id=call.request_id)
        except DecodeError:
            error = HeadraceError("INTERNAL", "the gateway sent a status that cannot be read", code="INTERNAL")
        if error.code == "UNAVAILABLE" and error.reason == "NO_WORKER" and error.retry_after_s == 0:
            self._on_end(self)  # it takes no more calls
            if call.move():
                return
        call.put(error)

    def _give_up(self, error: grpc.RpcError | None) -> None:
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            if error is not None and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                call.go_alone()
            elif error is not None:
                if call.begun or not self._options.retries:
                    call.put(from_rpc(error, endpoint=self._options.endpoint, request_id=call.request_id))
                else:
                    call.go_alone()  # gRPC's own retries take over from here
            elif not call.move():
                call.put(HeadraceError("UNREACHABLE", "the session ended under its call", code="UNAVAILABLE"))


class Sessions:
    """The client's newest session, opened when it is first needed."""

    def __init__(self, gateways: GatewayList[aio.Channel, InferenceAsyncStub], options: ChannelOptions) -> None:
        self._gateways = gateways
        self._options = options
        self._newest: _Session | None = None
        self._all: set[_Session] = set()

    def start(self, call: SessionCall) -> None:
        """Begin a call in the newest session."""
        endpoint = self._gateways.endpoint
        if self._newest is None or self._newest.endpoint != endpoint:
            self._newest = _Session(endpoint, self._gateways.stub, self._options, self._ended)
            self._all.add(self._newest)
        self._newest.start(call)

    def _ended(self, session: _Session) -> None:
        if self._newest is session:
            self._newest = None

    async def close(self) -> None:
        """End every session."""
        await asyncio.gather(*(session.close() for session in self._all))
        self._all.clear()
