"""Servers for the tests of the driver: the simulated engine's SSE API in this process, and a scripted client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine
from cluster.worker.weights.tokenizer_bundle import build_bundle
from loadtests.faces import Answer, OnText, Request
from loadtests.serving.ours import plain_tokens
from loadtests.serving.sse_engine import Connection, Server
from tests.support.checkpoints import build_tokenizer

MODEL = "bench"


@dataclass
class Scripted:
    """Scripted client that answers as `script` defines, so that tests of the driver need no server."""

    script: Callable[[Request, OnText, int], AsyncIterator[Answer]]
    name: str = "scripted"
    calls: int = 0
    running: int = 0
    most: int = 0
    sent: list[str] = field(default_factory=list)

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make one call: run the script for the request."""
        number, self.calls = self.calls, self.calls + 1
        self.running += 1
        self.most = max(self.most, self.running)
        self.sent.append(request.key)
        try:
            return await anext(self.script(request, on_text, number))
        finally:
            self.running -= 1

    async def close(self) -> None:
        """Do nothing."""


@dataclass
class SseServer:
    """The simulated engine as a plain OpenAI server on a loopback port."""

    url: str
    server: Server
    listening: asyncio.Server
    connections: list[Connection]

    def die(self) -> None:
        """Stop accepting connections and abort every connection, as when a process is killed."""
        self.listening.close()
        for connection in self.connections:
            connection.cut()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, str]:
    """Bundle of a tiny tokenizer, and source parameters that limit the engine to tokens that are complete texts by
    themselves."""
    folder = build_tokenizer("llama", tmp_path_factory.mktemp("loadtests"))
    return build_bundle(folder), plain_tokens(folder)


@pytest.fixture
async def sse(bundle: tuple[Bundle, str]) -> AsyncIterator[SseServer]:
    """Server on the simulated engine with steps of 2 ms."""
    files, tokens = bundle
    engine = SimEngine(SimConfig.from_source(f"sim://?decode_ms=2&vocab=768&max_model_len=2048&{tokens}"))
    await engine.start()
    server = Server(engine, TextModel.from_bundle(files), MODEL)
    connections: list[Connection] = []

    def connect() -> Connection:
        connections.append(Connection(server))
        return connections[-1]

    listening = await asyncio.get_running_loop().create_server(connect, "127.0.0.1", 0)
    stepping = asyncio.create_task(server.run())
    host, port = listening.sockets[0].getsockname()
    try:
        yield SseServer(f"http://{host}:{port}", server, listening, connections)
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        listening.close()
