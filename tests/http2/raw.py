"""An HTTP/2 client for behavior that grpc's client never shows: small windows, floods, silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes, Settings


class Raw:
    """A client connection that uses the library h2. `events` holds all received events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int) -> None:
        self._reader, self._writer = reader, writer
        self.h2 = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.local_settings = Settings(client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.h2.initiate_connection()
        self.events: list[Event] = []
        self.data: dict[int, bytearray] = {}
        self.eof = False

    async def flush(self) -> None:
        """Send the bytes that h2 has prepared."""
        self._writer.write(self.h2.data_to_send())
        await self._writer.drain()

    async def send(self, data: bytes) -> None:
        """Send bytes that bypass h2."""
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, *, acknowledge: bool = True) -> None:
        """Read once. `acknowledge`: whether to enlarge the flow-control windows by the received bytes."""
        raw = await self._reader.read(65_536)
        if not raw:
            self.eof = True
            return
        for event in self.h2.receive_data(raw):
            self.events.append(event)
            if isinstance(event, DataReceived):
                assert event.stream_id is not None
                self.data.setdefault(event.stream_id, bytearray()).extend(event.data or b"")
                if acknowledge and event.flow_controlled_length:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        await self.flush()

    async def call(
        self, method: str, message: bytes | None, *, end: bool = True, service: str = "test.Echo", **headers: str
    ) -> int:
        """Open a stream, send a call's headers and message, and return the stream's id."""
        stream_id = self.h2.get_next_available_stream_id()
        fields = {"content-type": "application/grpc", "te": "trailers"} | headers
        head = [(":method", "POST"), (":scheme", "http"), (":path", f"/{service}/{method}"), (":authority", "test")]
        self.h2.send_headers(stream_id, [*head, *fields.items()])
        if message is not None:
            self.h2.send_data(stream_id, b"\x00" + len(message).to_bytes(4, "big") + message, end_stream=end)
        await self.flush()
        return stream_id

    async def until_ended(self, stream_id: int) -> dict[str, str]:
        """Read until the stream has ended, and return the stream's trailers."""
        while not self.eof:
            for event in self.events:
                if isinstance(event, StreamEnded | StreamReset) and event.stream_id == stream_id:
                    return self.trailers(stream_id)
            await self.receive()
        raise AssertionError("the connection ended before the stream")

    def trailers(self, stream_id: int) -> dict[str, str]:
        """The trailers of an ended stream."""
        for event in reversed(self.events):
            if isinstance(event, TrailersReceived | ResponseReceived) and event.stream_id == stream_id:
                return {str(name): str(value) for name, value in event.headers or ()}
        return {}

    @property
    def goaway(self) -> ConnectionTerminated | None:
        """The last received GOAWAY; None if no GOAWAY was received."""
        return next((e for e in reversed(self.events) if isinstance(e, ConnectionTerminated)), None)


@asynccontextmanager
async def raw_client(port: int, window: int = 65_535) -> AsyncIterator[Raw]:
    """Connect a client whose streams have a receive window of `window` bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = Raw(reader, writer, window)
    await raw.flush()
    try:
        yield raw
    finally:
        writer.close()
