"""Client of any OpenAI-compatible endpoint: /v1/chat/completions and /v1/completions as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from loadtests.faces.base import Answer, CallFailed, OnText, Request
from loadtests.faces.http1 import Connection

MAX_ERROR_BYTES = 4096
REUSE_S = 1.0
"""Seconds for which an idle connection is used again. Servers close theirs after five seconds, and a call that is sent
at that moment fails. The rest of the five seconds is for a server that stalls before it reads the call."""


class _Events:
    """Parser of one answer: takes bytes, emits pieces of text and keeps the reported counts."""

    def __init__(self, chat: bool, on_text: OnText) -> None:
        self._chat = chat
        self._on_text = on_text
        self._rest = b""
        self.head = b""
        self.usage: dict[str, Any] | None = None
        self.finish = ""
        self.started = False
        self.error = ""

    def feed(self, data: bytes) -> None:
        if len(self.head) < MAX_ERROR_BYTES:
            self.head += data[:MAX_ERROR_BYTES]
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    self._data(line[5:].strip())

    def _data(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        value = json.loads(data)
        if "error" in value:
            self.error = str(value["error"])
            return
        for choice in value.get("choices") or ():
            text = _delta_text(choice.get("delta") or {}) if self._chat else choice.get("text")
            if text:
                self.started = True
                self._on_text(text)
            self.finish = choice.get("finish_reason") or self.finish
        self.usage = value.get("usage") or self.usage


def _delta_text(delta: Mapping[str, Any]) -> str:
    """Return the text of a chat's delta: its content, and names and arguments of its tool calls."""
    text: str = delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        text += (function.get("name") or "") + (function.get("arguments") or "")
    return text


class OpenAiSse:
    """Client with one call per connection, from a pool of kept-alive connections."""

    name = "http"

    def __init__(self, url: str, model: str, *, api_key: str = "") -> None:
        """Store the address. `url` is the root of the server, e.g. http://127.0.0.1:8000. Raises ValueError if `url`
        does not have the form http://host:port."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"endpoint {url!r}: expected http://HOST:PORT (plain HTTP, the driver speaks no TLS)")
        self._host, self._port = parts.hostname, parts.port or 80
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._model = model
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[tuple[Connection, float]] = []

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call; see Face.run."""
        events = _Events(request.chat, on_text)
        connection = await self._connection()
        whole = False
        try:
            status = await connection.request(self._bytes(request), events.feed)
            whole = True
        finally:
            self._release(connection, whole=whole)
        if status != 200:
            raise CallFailed(f"status {status}", events.head[:300].decode(errors="replace"))
        if events.error:
            raise CallFailed("error event", events.error[:300])
        if events.usage is None:
            raise CallFailed(CallFailed.PROTOCOL, "the stream ended without usage (stream_options.include_usage)")
        usage = events.usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(usage.get("completion_tokens"), usage.get("prompt_tokens"), cached, events.finish)

    async def _connection(self) -> Connection:
        while self._idle:
            connection, since = self._idle.pop()
            if connection.usable and time.monotonic() - since < REUSE_S:
                return connection
            connection.close()
        try:
            _, made = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        except OSError as error:
            raise CallFailed(CallFailed.UNREACHABLE, f"{self._host}:{self._port}: {error.strerror or error}") from None
        return made

    def _release(self, connection: Connection, *, whole: bool) -> None:
        """Keep the connection of an ended call for a later call, or close it. It is closed if the answer is not
        complete (`whole` false) or if the connection cannot be used again."""
        if whole and connection.usable:
            self._idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def body(self, request: Request) -> bytes:
        """Return the body of a call, as JSON."""
        body: dict[str, Any] = {
            "model": request.model or self._model,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.chat:
            body["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            body["prompt"] = request.prompt
        return json.dumps(body, separators=(",", ":")).encode()

    def _bytes(self, request: Request) -> bytes:
        return self._post(f"/v1/{'chat/' if request.chat else ''}completions", self.body(request))

    def _post(self, path: str, data: bytes) -> bytes:
        """Return the bytes of an HTTP POST request. `path`: below the root; `data`: the body."""
        head = (
            f"POST {self._root}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\n{self._key}Content-Length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    async def close(self) -> None:
        """Close all connections; see Face.close."""
        while self._idle:
            self._idle.pop()[0].close()
