"""Relay of TCP connections on loopback that can be cut in one direction or in both, to simulate a broken network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

CHUNK = 65_536


class Direction:
    """One direction of a relayed connection."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    def cut(self) -> None:
        """Hold back all data from now on, without closing the connection."""
        self._open.clear()

    def heal(self) -> None:
        """Pass on the blocked data and all later data."""
        self._open.set()

    async def relay_data(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Relay data until the reader has ended."""
        while data := await reader.read(CHUNK):
            await self._open.wait()
            writer.write(data)
            await writer.drain()


class Cuttable:
    """Relay of TCP connections to `target`.

    `ways`: the two directions of each current connection, in the order of opening. The first carries data from the
    client to `target`, the second carries data back.
    """

    def __init__(self, target: str, listen: str = "127.0.0.1") -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listen = listen
        self.address = ""
        self.ways: list[tuple[Direction, Direction]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, self._listen, 0)
        self.address = f"{self._listen}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def sever(self) -> None:
        """Reset every current connection, so that both sides notice at once."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ways = up, down = Direction(), Direction()
        self.ways.append(ways)
        pair = {writer}
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            there, back = await asyncio.open_connection(*self._target)
            pair.add(back)
            self._writers |= pair
            carriers = [
                asyncio.create_task(up.relay_data(reader, back)),
                asyncio.create_task(down.relay_data(there, writer)),
            ]
            try:
                await asyncio.wait(carriers, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for carrier in carriers:
                    carrier.cancel()
                await asyncio.gather(*carriers, return_exceptions=True)
        except (OSError, asyncio.CancelledError):  # cancelled by `stop`: this task closes the connection
            pass
        finally:
            self._tasks.discard(task)
            self._writers -= pair
            self.ways.remove(ways)
            for end in pair:
                with contextlib.suppress(OSError):
                    end.close()


@asynccontextmanager
async def cuttable(target: str, listen: str = "127.0.0.1") -> AsyncIterator[Cuttable]:
    """Run a relay to `target` (`host:port`) that listens on the address `listen` of this host."""
    relay = Cuttable(target, listen)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
