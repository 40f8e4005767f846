"""Program that opens connections with unfinished gRPC requests and sends as much of each request as the server
accepts.

    python -m loadtests.hostile.uploads HOST:PORT --report FILE --connections 20 --calls 1 --bytes 16000000 --key KEY
    python -m loadtests.hostile.uploads HOST:PORT --report FILE --connections 1000 --calls 40 --bytes 60000 --strange

The client respects flow control. Every request announces `--bytes` bytes and never sends the last byte. With
`--strange`, the requests have a header field of 3 KB each and go in turn to a method that needs no credential and
to one that needs a credential. At the end, each connection gets half a header block. With `--tls`, any certificate
is accepted. Once the server accepts no more, the number of bytes sent is written to FILE, and the connections stay
open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Final

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RemoteSettingsChanged
from h2.exceptions import H2Error
from hyperframe.frame import HeadersFrame

HEALTH: Final = "/grpc.health.v1.Health/Check"
CHAT: Final = "/cluster.v1.Inference/Chat"
QUIET_S: Final = 1.5
OPENED_TOGETHER: Final = 50
FIELD_BYTES: Final = 3000
"""Size of a header field in bytes. The field fits the HPACK dynamic table: after the first time, sending the field
costs one byte.
"""
HALF_BLOCK_BYTES: Final = 16_000


class Uploads:
    """One connection of the attacking client, with its unfinished requests."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wanted: argparse.Namespace) -> None:
        self._reader, self._writer, self._wanted = reader, writer, wanted
        self._h2 = H2Connection(H2Configuration(client_side=True))
        self._unsent: dict[int, int] = {}
        self._greeted = False
        self.sent_bytes = 0
        self.progress_at = asyncio.get_running_loop().time()

    async def run(self) -> None:
        """Run until the server closes the connection."""
        with suppress(OSError, H2Error):
            self._h2.initiate_connection()
            await self._flush()
            while data := await self._reader.read(65_536):
                events = self._h2.receive_data(data)
                if not self._greeted and any(isinstance(event, RemoteSettingsChanged) for event in events):
                    self._greeted = True
                    await self._open()
                await self._push()

    async def strange_end(self) -> None:
        """Send half a header block."""
        with suppress(OSError):
            self._writer.write(HeadersFrame(2**20 + 1, bytes(HALF_BLOCK_BYTES)).serialize())
            await self._writer.drain()

    async def _open(self) -> None:
        wanted = self._wanted
        for number in range(wanted.calls):
            stream_id = self._h2.get_next_available_stream_id()
            path = HEALTH if wanted.strange and number % 2 else CHAT
            head = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "a")]
            head += [("content-type", "application/grpc"), ("te", "trailers")]
            if wanted.key:
                head.append(("authorization", f"Bearer {wanted.key}"))
            if wanted.strange:
                head.append(("x-padding", "x" * FIELD_BYTES))
            self._h2.send_headers(stream_id, head)
            self._unsent[stream_id] = wanted.bytes + 4
            self._h2.send_data(stream_id, b"\x00" + wanted.bytes.to_bytes(4, "big"))
        await self._flush()

    async def _push(self) -> None:
        for stream_id, unsent in list(self._unsent.items()):
            try:
                size = min(unsent - 5, self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size)
                if size > 0:
                    self._h2.send_data(stream_id, bytes(size))
                    self._unsent[stream_id] -= size
                    self.sent_bytes += size
                    self.progress_at = asyncio.get_running_loop().time()
            except H2Error:  # the request was refused
                del self._unsent[stream_id]
        await self._flush()
        if self._unsent and any(
            unsent > 5 and self._h2.local_flow_control_window(stream_id) > 0
            for stream_id, unsent in self._unsent.items()
        ):
            asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self._push()))

    async def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()


def unchecked() -> ssl.SSLContext:
    """Return a TLS context without certificate checks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


async def attack(wanted: argparse.Namespace) -> None:
    """Open all connections, report the totals, and keep the connections open."""
    loop = asyncio.get_running_loop()
    host, _, port = wanted.address.rpartition(":")
    context = unchecked() if wanted.tls else None
    made: list[Uploads] = []
    running = []
    for first in range(0, wanted.connections, OPENED_TOGETHER):
        together = min(OPENED_TOGETHER, wanted.connections - first)
        streams = await asyncio.gather(
            *(asyncio.open_connection(host, int(port), ssl=context) for _ in range(together))
        )
        opened = [Uploads(reader, writer, wanted) for reader, writer in streams]
        running += [asyncio.create_task(upload.run()) for upload in opened]
        made += opened
        await asyncio.sleep(0.02)
    while loop.time() - max(upload.progress_at for upload in made) < QUIET_S:  # noqa: ASYNC110 - looks for a time without news
        await asyncio.sleep(0.05)
    if wanted.strange:
        for upload in made:
            await upload.strange_end()
        await asyncio.sleep(QUIET_S)
    totals = {"sent_bytes": sum(upload.sent_bytes for upload in made), "open": sum(not task.done() for task in running)}
    scratch = wanted.report.with_suffix(".new")
    scratch.write_text(json.dumps(totals))
    scratch.rename(wanted.report)
    await asyncio.Event().wait()


def main() -> None:
    """Parse the command line and attack."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--calls", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=16_000_000)
    parser.add_argument("--key", default="")
    parser.add_argument("--strange", action="store_true")
    parser.add_argument("--tls", action="store_true")
    asyncio.run(attack(parser.parse_args()))


if __name__ == "__main__":
    main()
