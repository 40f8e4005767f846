"""A worker's connection to its parser process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.worker.parsing import wire
from cluster.worker.parsing.parser_process import ParserHost


@dataclass(slots=True)
class ParserConnection:
    """The connection to a running parser process. `is_ready`: whether the process has loaded its parsers."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_ready: bool = False

    @classmethod
    async def open(cls, host: ParserHost) -> ParserConnection:
        """Connect to a parser process that has been started."""
        return cls(*await asyncio.open_connection(sock=host.connection))

    def send(self, message: wire.Request) -> None:
        """Send a message. If the process does not read, the message is buffered."""
        self.writer.write(wire.encode(message))

    async def receive(self) -> wire.Reply:
        """Wait for the next message and return it.

        Raises EOFError if the process has closed the connection, OSError or ValueError if the connection is broken.
        """
        (size,) = wire.LENGTH.unpack(await self.reader.readexactly(wire.LENGTH.size))
        if size > wire.MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        return wire.decode_reply(await self.reader.readexactly(size))

    def close(self) -> None:
        """Close the connection. The process then ends."""
        self.writer.close()
