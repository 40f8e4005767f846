"""A worker's connection to its parser process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.worker.parsing import wire
from cluster.worker.parsing.parser_process import ParserHost


@dataclass(slots=True)
class ParserConnection:
    """A connected parser process. `is_ready`: whether it has loaded its parsers."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_ready: bool = False

    @classmethod
    async def open(cls, host: ParserHost) -> ParserConnection:
        """Connect to a parser process that has been started."""
        return cls(*await asyncio.open_connection(sock=host.connection))

    def send(self, message: wire.Request) -> None:
        """Send a message. It is buffered if the process does not read."""
        self.writer.write(wire.encode(message))

    async def receive(self) -> wire.Reply:
        """Wait for the next message. Raises EOFError at the end, and OSError or ValueError for a broken connection."""
        (size,) = wire.LENGTH.unpack(await self.reader.readexactly(wire.LENGTH.size))
        if size > wire.MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        return wire.decode_reply(await self.reader.readexactly(size))

    def close(self) -> None:
        """Close the connection, which ends the process unless it hangs."""
        self.writer.close()
