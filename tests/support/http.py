"""HTTP as bytes: requests to the gateway's HTTP API and responses from it, without a client library."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import openai

from tests.support.cluster import TestCluster


def client(cluster: TestCluster, **options: Any) -> openai.AsyncOpenAI:
    """Return the official openai client, without retries."""
    base_url = f"http://{cluster.gateway.endpoints['http']}/v1"
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, **options)


def chat_body(text: str = "Hello, who are you?", **fields: Any) -> dict[str, Any]:
    """Return the body of a chat request with one user message; temperature 0 and 16 tokens by default."""
    return {
        "model": "sim",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 16,
        **fields,
    }


def completion_body(prompt: Any = "Once upon a time", **fields: Any) -> dict[str, Any]:
    """Return the body of a completion request with a plain prompt; temperature 0 and 16 tokens by default."""
    return {"model": "sim", "prompt": prompt, "temperature": 0, "max_tokens": 16, **fields}


def message_body(text: str = "Hello, who are you?", **fields: Any) -> dict[str, Any]:
    """Return the body of a request of Anthropic's Messages API with one user message; temperature 0 and 16 tokens by
    default."""
    return chat_body(text, **fields)


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole response. `body` has all chunks joined; `chunks` has the chunks separately."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunks: tuple[bytes, ...] = ()

    @property
    def json(self) -> Any:
        """The response body, parsed as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """Error object of the response, in OpenAI's form."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert self.json.keys() == {"error"}
        assert isinstance(error, dict)
        return error

    @property
    def events(self) -> list[Any]:
        """Data of the events of a stream, without the end marker and comments."""
        blocks = self.body.decode("ascii").split("\n\n")
        data = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
        return [json.loads(item) for item in data if item != "[DONE]"]


class Wire:
    """A connection to the gateway's HTTP API."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, cluster: TestCluster, limit: int = 1 << 26, port: str = "http") -> Wire:
        """Connect to the HTTP API, or to another port by its name, and return the connection."""
        host, port = cluster.gateway.endpoints[port].rsplit(":", 1)
        return cls(*await asyncio.open_connection(host, int(port), limit=limit))

    def ask(self, path: str, body: Any = None, *, method: str = "", **headers: str) -> None:
        """Send a request. A body that is not bytes is sent as JSON. In the names of `headers`, `_` stands for `-`."""
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {"host": "test", **({} if body is None else {"content-type": "application/json"})}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        if content and "transfer-encoding" not in named:
            named.setdefault("content-length", str(len(content)))
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in named.items()]
        self.writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of a response and return the status and the headers.

        The values of a repeated header are joined by a line feed.
        """
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
        headers: dict[str, str] = {}
        for name, value in (line.split(": ", 1) for line in lines[1:] if line):
            headers[name] = f"{headers[name]}\n{value}" if name in headers else value
        return int(lines[0].split()[1]), headers

    async def chunk(self) -> bytes:
        """Read and return one chunk of a chunked body; empty at the end of the body."""
        size = int(await self.reader.readline(), 16)
        data = await self.reader.readexactly(size)
        assert await self.reader.readexactly(2) == b"\r\n"
        return data

    async def reply(self) -> Reply:
        """Read and return the whole response."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") != "chunked":
            size = 0 if status in (204, 304) else int(headers["content-length"])
            return Reply(status, headers, await self.reader.readexactly(size))
        chunks = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return Reply(status, headers, b"".join(chunks), tuple(chunks))

    async def close(self) -> None:
        """Close the connection."""
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


async def fetch(cluster: TestCluster, path: str, body: Any = None, **options: Any) -> Reply:
    """Send one request on a new connection and return the response."""
    wire = await Wire.open(cluster)
    try:
        wire.ask(path, body, **options)
        return await wire.reply()
    finally:
        await wire.close()
