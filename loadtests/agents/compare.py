"""Answers of an OpenAI-compatible server, whole or streamed, and the differences between two servers' answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtests.faces.base import CallFailed
from loadtests.faces.http1 import Connection

REASONING = ("reasoning", "reasoning_content")
"""Names of the field with the reasoning. vLLM uses the first name, most other servers use the second."""
CALL_S = 120.0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of an answer. `arguments` is the received text, not parsed."""

    name: str
    arguments: str

    @property
    def parsed(self) -> Any:
        """The arguments as a JSON value; None if the text is no JSON."""
        try:
            return json.loads(self.arguments)
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. A field that is missing or null in the answer is "". `error`: status and body of a refusal, else
    ""."""

    finish: str = ""
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    error: str = ""


@dataclass(slots=True)
class _Parts:
    """The texts of an answer, collected from the deltas of a stream. The message of a whole answer counts as a single
    delta."""

    finish: str = ""
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, tuple[list[str], list[str]]] = field(default_factory=dict)

    def add(self, message: Mapping[str, Any]) -> None:
        self.content.append(message.get("content") or "")
        self.reasoning.append(next((message[name] for name in REASONING if message.get(name)), ""))
        for at, call in enumerate(message.get("tool_calls") or ()):
            names, arguments = self.calls.setdefault(call.get("index", at), ([], []))
            function = call.get("function") or {}
            names.append(function.get("name") or "")
            arguments.append(function.get("arguments") or "")

    def answer(self) -> Answer:
        calls = (self.calls[index] for index in sorted(self.calls))
        joined = tuple(ToolCall("".join(names), "".join(arguments)) for names, arguments in calls)
        return Answer(self.finish, "".join(self.content), "".join(self.reasoning), joined)


def read_answer(status: int, body: bytes) -> Answer:
    """Return the answer in a response body: one JSON object, or server-sent events."""
    text = body.decode()
    if status != 200:
        return Answer(error=f"{status} {text[:500]}")
    parts = _Parts()
    for value in _events(text) if text.lstrip().startswith(("data:", ":", "event:")) else (json.loads(text),):
        if value.get("error"):
            return Answer(error=json.dumps(value["error"])[:500])
        for choice in value.get("choices") or ():
            parts.add(choice.get("delta") or choice.get("message") or {})
            parts.finish = choice.get("finish_reason") or parts.finish
    return parts.answer()


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which two answers to the same request differ."""

    field: str
    theirs: str
    ours: str


def differences(theirs: Answer, ours: Answer) -> list[Difference]:
    """Return the fields in which two answers differ. If the arguments of a tool call differ as text, also compare them
    as JSON values.

    An error on either side, or on both, is a difference: there is nothing to compare.
    """
    if theirs.error or ours.error:
        return [Difference("error", theirs.error, ours.error)]
    pairs: list[tuple[str, Any, Any]] = [
        (name, getattr(theirs, name), getattr(ours, name)) for name in ("finish", "content", "reasoning")
    ]
    pairs.append(("number of calls", len(theirs.calls), len(ours.calls)))
    for number, (one, other) in enumerate(zip(theirs.calls, ours.calls, strict=False)):
        pairs.append((f"name of call {number}", one.name, other.name))
        pairs.append((f"arguments of call {number}", one.arguments, other.arguments))
        if one.arguments != other.arguments:
            pairs.append((f"arguments of call {number} as JSON", one.parsed, other.parsed))
    return [Difference(name, repr(one), repr(other)) for name, one, other in pairs if one != other]


CUT, NAMED_END = "cut", "named"
"""Known ways in which finish reasons differ; see known_finish."""


def known_finish(theirs: Answer, ours: Answer, *, is_cut: bool, is_named: bool) -> str:
    """Return CUT or NAMED_END if the finish reasons differ in a known way; else "".

    CUT: max_tokens or a stop string has cut the answer within a tool call. Headrace then reports `length` or `stop`, as
    vLLM does for a streamed answer. For an answer in one piece vLLM reports `tool_calls`, so an agent cannot know that
    the tool call is incomplete or missing. NAMED_END: the caller has chosen the tool by name. vLLM then reports `stop`,
    Headrace `tool_calls`.
    """
    if (
        is_cut
        and theirs.finish == "tool_calls"
        and (ours.finish == "length" or (ours.finish == "stop" and not ours.calls))
    ):
        return CUT
    return NAMED_END if is_named and (theirs.finish, ours.finish) == ("stop", "tool_calls") else ""


class Server:
    """Client of one OpenAI-compatible server on loopback, with a pool of connections."""

    def __init__(self, port: int, key: str = "") -> None:
        """Store the address. `key`: API key, or "" for none."""
        self._port = port
        self._key = f"Authorization: Bearer {key}\r\n" if key else ""
        self._idle: list[Connection] = []

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """Make a chat call and return the whole answer. A broken connection becomes an answer with an error."""
        try:
            return read_answer(*await self._send("POST", "/v1/chat/completions", json.dumps(body).encode()))
        except (CallFailed, OSError, TimeoutError) as error:
            return Answer(error=f"no answer: {error!r}")

    async def ready_models(self) -> set[str]:
        """Return the names of the models that a gateway lists as ready; empty while the server does not answer."""
        try:
            status, body = await self._send("GET", "/v1/models")
        except (CallFailed, OSError, TimeoutError):
            return set()
        if status != 200:
            return set()
        return {model["id"] for model in json.loads(body)["data"] if model.get("state") == "READY"}

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()

    async def _send(self, method: str, path: str, data: bytes = b"") -> tuple[int, bytes]:
        """Send a request; return status and body. Raises CallFailed, OSError or TimeoutError."""
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nContent-Type: application/json\r\n"
        head += f"{self._key}Content-Length: {len(data)}\r\n\r\n"
        pieces: list[bytes] = []
        async with asyncio.timeout(CALL_S):
            connection = await self._connection()
            status = await connection.request(head.encode() + data, pieces.append)
        if connection.usable:
            self._idle.append(connection)
        return status, b"".join(pieces)

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", self._port)
        return made
