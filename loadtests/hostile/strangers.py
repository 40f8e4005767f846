"""Program of anonymous clients that hold connections to all ports of a gateway, send little, and reconnect when cut.

python -m loadtests.hostile.strangers --count 1000 --ready FILE --port http=127.0.0.1:8000 --port grpc=...

The connections are spread evenly over the ports and over four behaviours: silent, half a head, one byte of a head every
two seconds, and greeted (HTTP/2's preface and settings, or half of an HTTP/1 head). FILE is written when each
connection has been tried once.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
from collections.abc import Iterator
from contextlib import suppress
from itertools import cycle, islice
from pathlib import Path

HTTP1 = ("http", "metrics")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
DRIBBLE_S = 2.0
AGAIN_S = 0.5
"""Pause in seconds between the end of a connection and the next connection."""
AT_ONCE = 50
CONNECT_S = 5.0


def opening(port: str, habit: str) -> bytes:
    """Return the first bytes that a client sends to a port. `port`: name of the port. `habit`: the client's behaviour,
    such as "silent" or "greeted"."""
    if habit == "silent":
        return b""
    if port in HTTP1:
        return b"GET /health HTTP/1.1\r\nhost: a\r\nx: " if habit == "greeted" else b"GE"
    return PREFACE + SETTINGS if habit == "greeted" else PREFACE[:8]


async def hold(port: str, address: str, habit: str, tried: asyncio.Semaphore, gate: asyncio.Semaphore) -> None:
    """Keep one connection open until cancelled, and reconnect whenever the server closes it. `port`: name of the port,
    such as `http`. `habit`: behaviour of the client, such as `silent` or `dribbled`. `tried` is released after the
    first attempt. `gate` limits the number of attempts at the same time."""
    host, number = address.rsplit(":", 1)
    first = True
    while True:
        with suppress(OSError, TimeoutError):
            async with gate, asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(host, int(number))
            if first:
                tried.release()
                first = False
            writer.write(opening(port, habit))
            while not reader.at_eof():
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(65_536), DRIBBLE_S)
                    continue
                if habit == "dribbled":
                    writer.write(b"a")
            writer.close()
        if first:
            tried.release()
            first = False
        await asyncio.sleep(AGAIN_S)


def spread(ports: list[str], count: int) -> Iterator[tuple[str, str, str]]:
    """Yield (port, address, behaviour) of each client."""
    named = [port.split("=", 1) for port in ports]
    for index, (port, address) in enumerate(islice(cycle(named), count)):
        yield port, address, ("silent", "half", "dribbled", "greeted")[index // len(named) % 4]


async def main(arguments: argparse.Namespace) -> None:
    """Hold all connections until killed."""
    tried, gate = asyncio.Semaphore(0), asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as group:
        for client in spread(arguments.port, arguments.count):
            group.create_task(hold(*client, tried, gate))
        for _ in range(arguments.count):
            await tried.acquire()
        arguments.ready.write_text("tried")


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", action="append", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--ready", type=Path, required=True)
    asyncio.run(main(parser.parse_args()))
