"""Program that opens connections with unfinished HTTP/1 requests and sends as much of each request as the server reads.

    python -m loadtests.hostile.http_uploads HOST:PORT --report FILE --connections 20 --key KEY
    python -m loadtests.hostile.http_uploads HOST:PORT --report FILE --connections 1000

With a key, every connection sends a body without its last byte, and every second one of these bodies is chunked.
Without a key, the connections alternate: a body of 16 MB without its last byte, 10,000 pipelined requests whose answers
are not read, and a head that does not end. Once the server reads no more, the number of bytes sent is written to FILE,
and the connections stay open.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

PATH: Final = "/v1/chat/completions"
PART_BYTES: Final = 65_536
QUIET_S: Final = 1.5
OPENED_TOGETHER: Final = 50
PIPELINED: Final = 10_000
HEAD_BYTES: Final = 60_000


def unfinished(size: int, key: str, chunked: bool) -> Iterator[bytes]:
    """Yield the parts of a request whose body lacks the last byte."""
    length = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
    shown = f"authorization: Bearer {key}\r\n" if key else ""
    yield f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{shown}{length}\r\n\r\n".encode()
    remaining = size - 1
    while remaining:
        part = min(remaining, PART_BYTES)
        yield b"%x\r\n%b\r\n" % (part, b" " * part) if chunked else b" " * part
        remaining -= part


def pipelined() -> Iterator[bytes]:
    """Yield requests that are sent one after the other, without reading their answers."""
    for _ in range(PIPELINED // 100):
        yield b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n" * 100


def half_head() -> Iterator[bytes]:
    """Yield the parts of a request head that has many fields and does not end."""
    yield f"POST {PATH} HTTP/1.1\r\nhost: a\r\n".encode()
    yield b"".join(b"x%d: %b\r\n" % (i, b"y" * 280) for i in range(HEAD_BYTES // 300))


class Upload:
    """An attacking connection."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self.sent_bytes = 0
        self.open = True
        self.progress_at = asyncio.get_running_loop().time()

    async def run(self, host: str, port: int) -> None:
        """Send all data that the server accepts, and read nothing."""
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port, limit=1)
            try:
                for part in self._parts:
                    writer.write(part)
                    await writer.drain()
                    self.sent_bytes += len(part)
                    self.progress_at = asyncio.get_running_loop().time()
                await asyncio.Event().wait()
            finally:
                writer.close()
                del reader
        self.open = False


def parts_of(number: int, wanted: argparse.Namespace) -> Iterator[bytes]:
    """Return the bytes that connection number `number` sends, in parts. `wanted`: the options of the command line."""
    if wanted.key:
        return unfinished(wanted.bytes, wanted.key, number % 2 == 1)
    kinds = (lambda: unfinished(wanted.bytes, "", False), pipelined, half_head)
    return kinds[number % len(kinds)]()


async def attack(wanted: argparse.Namespace) -> None:
    """Open all connections, report the totals, and keep the connections open."""
    loop = asyncio.get_running_loop()
    host, _, port = wanted.address.rpartition(":")
    made = [Upload(parts_of(number, wanted)) for number in range(wanted.first, wanted.first + wanted.connections)]
    running = []
    for first in range(0, len(made), OPENED_TOGETHER):
        running += [
            asyncio.create_task(upload.run(host, int(port))) for upload in made[first : first + OPENED_TOGETHER]
        ]
        await asyncio.sleep(0.02)
    while loop.time() - max(upload.progress_at for upload in made) < QUIET_S:  # noqa: ASYNC110 - looks for a time without news
        await asyncio.sleep(0.05)
    totals = {"sent_bytes": sum(upload.sent_bytes for upload in made), "open": sum(upload.open for upload in made)}
    scratch = wanted.report.with_suffix(".new")
    scratch.write_text(json.dumps(totals))
    scratch.rename(wanted.report)
    await asyncio.gather(*running)


def main() -> None:
    """Parse the command line and attack."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="which of the three kinds the first connection is")
    parser.add_argument("--bytes", type=int, default=16_000_000)
    parser.add_argument("--key", default="")
    asyncio.run(attack(parser.parse_args()))


if __name__ == "__main__":
    main()
