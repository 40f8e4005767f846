"""The link listener. If a peer connects before the gateway serves links, it waits in the backlog of the port, and is
served afterwards."""

from __future__ import annotations

import asyncio
import socket

import pytest
import yaml

from cluster import http2
from cluster.config.document import parse
from cluster.gateway.links.hub import LIMITS
from cluster.gateway.links.listener import bind_link

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
ANSWER_S = 60.0


def config_of(link: str) -> str:
    """Return a configuration with `link` as the gateway's address for links."""
    model = {"name": "m", "source": "sim:///of-nobody"}
    gateway = {"listen": {"link": link}}
    return yaml.safe_dump({"api_version": "headrace/v1", "name": "early", "gateway": gateway, "models": [model]})


async def test_who_dials_early_is_heard_later() -> None:
    """A worker can connect as soon as the link port is bound, before the gateway reads from it. Its messages are
    answered once the gateway reads."""
    listener = bind_link(parse(config_of("127.0.0.1:0")))
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    writer.write(PREFACE)
    server = http2.Server(LIMITS)
    assert await server.serve(listener) == listener.getsockname()[1]
    async with asyncio.timeout(ANSWER_S):
        head = await reader.readexactly(9)
    assert head[3] == 4, "the first frame of HTTP/2 is SETTINGS"
    writer.close()
    await server.stop(0)


def test_a_port_that_is_taken_is_told_with_its_setting() -> None:
    """The error for a link port that is in use names the setting, like the error of any other listener."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=rf"gateway\.listen\.link: {address} cannot be bound: "):
            bind_link(parse(config_of(address)))
