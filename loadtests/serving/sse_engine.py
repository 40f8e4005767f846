"""Program that runs the simulated engine as a plain OpenAI server. Other routers, which are compared with our
gateway, run in front of it.

python -m loadtests.serving.sse_engine --port PORT --model NAME --bundle DIR --source sim:///folder?...

Engine, seed, steps, tokenizer and detokenizer are the same as behind our gateway, so the texts must be equal. The
chunks have vLLM's format, one chunk per token. The server is one process on a bare asyncio protocol; the CPU time
of this process is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, FinishReason, Sampling, TokenOutput
from cluster.gateway.text.detokenizer import Detokenizer
from cluster.gateway.text.encoding.text_jobs import ENCODE_OFFLOAD_CHARS
from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_numbers = itertools.count(1)


async def _encoded(encode: Callable[[Any], list[int]], what: Any, chars: int) -> list[int]:
    """Tokenize a text; a long text is tokenized in a thread of the loop's pool, as vLLM's server does."""
    return await asyncio.to_thread(encode, what) if chars > ENCODE_OFFLOAD_CHARS else encode(what)


@dataclass(slots=True)
class _Stream:
    connection: Connection
    detokenizer: Detokenizer
    prefix: str
    chat: bool
    include_usage: bool
    prompt_tokens: int
    tokens: int = 0
    text: str = ""


class Server:
    """The engine, the loop that steps it, and the streams of its calls."""

    def __init__(self, engine: SimEngine, text: TextModel, model: str) -> None:
        self.engine = engine
        self.text = text
        self.model = model
        self.served = 0
        self._streams: dict[str, _Stream] = {}

    async def run(self) -> None:
        """Step the engine until cancelled; send all tokens of a step at once, one chunk for each token."""
        while True:
            for output in await self.engine.step():
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    self._write(output, stream)

    def _write(self, output: TokenOutput, stream: _Stream) -> None:
        stream.detokenizer.push(output.token_ids)
        stream.tokens += len(output.token_ids)
        ended = output.finish is not None
        text = stream.detokenizer.pop_text(ended)
        reason = {FinishReason.LENGTH: '"length"', None: "null"}.get(output.finish, '"stop"')
        body = f'"delta":{{"content":{json.dumps(text)}}}' if stream.chat else f'"text":{json.dumps(text)}'
        event = (
            f'data: {stream.prefix}"choices":[{{"index":0,{body},"logprobs":null,"finish_reason":{reason},'
            '"token_ids":null}]}\n\n'
        )
        if ended:
            del self._streams[output.request_id]
            if stream.include_usage:
                total = stream.prompt_tokens + stream.tokens
                usage = (
                    f'{{"prompt_tokens":{stream.prompt_tokens},"total_tokens":{total},'
                    f'"completion_tokens":{stream.tokens}}}'
                )
                event += f'data: {stream.prefix}"choices":[],"usage":{usage}}}\n\n'
            event += "data: [DONE]\n\n"
        stream.connection.chunk(event.encode(), last=ended)

    async def start(self, body: dict[str, Any], chat: bool, connection: Connection) -> str:
        """Begin a call and return the id of the call in the engine. Raises ValueError or EngineRefused."""
        if chat:
            messages = body["messages"]
            ids = await _encoded(self.text.codec.encode_chat, messages, sum(len(m["content"]) for m in messages))
        else:
            prompt = body["prompt"]
            is_text = isinstance(prompt, str)
            ids = await _encoded(self.text.codec.encode_prompt, prompt, len(prompt)) if is_text else list(prompt)
        sampling = Sampling(
            max_tokens=int(body.get("max_tokens") or body.get("max_completion_tokens") or 16),
            temperature=float(body.get("temperature", 1.0)),
            top_p=float(body.get("top_p", 1.0)),
            ignore_eos=bool(body.get("ignore_eos", False)),
        )
        number = next(_numbers)
        self.served += 1
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = f'"id":"{"chatcmpl" if chat else "cmpl"}-{number:016x}","object":"{kind}"'
        prefix = f'{{{head},"created":{int(time.time())},"model":{json.dumps(self.model)},'
        include_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        detokenizer = self.text.detokenizer(ids)
        key = f"r{number}"
        await self.engine.submit(EngineRequest(key, ids, sampling))
        self._streams[key] = _Stream(connection, detokenizer, prefix, chat, include_usage, len(ids))
        connection.head()
        if chat:
            role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}'
            connection.chunk(f'data: {prefix}"choices":[{{"index":0,{role}\n\n'.encode())
        return key

    async def abort(self, key: str) -> None:
        """End a call whose caller has disconnected."""
        if self._streams.pop(key, None) is not None:
            await self.engine.abort([key])


class Connection(asyncio.Protocol):
    """Kept-alive connection that serves requests one after the other."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._key = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def streaming(self) -> bool:
        """Whether an answer is in progress."""
        return bool(self._key)

    def cut(self) -> None:
        """Abort the connection, as when a process is killed."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle a new connection: store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Handle the end of the connection: end the call of a caller that has disconnected."""
        self._transport = None
        if self._key:
            self._task = asyncio.create_task(self._server.abort(self._key))

    def data_received(self, data: bytes) -> None:
        """Handle a request, or a part of a request."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", "0"))
        if len(self._buffer) < end + 4 + length:
            return
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        del self._buffer[: end + 4 + length]
        method, path = lines[0].split(" ")[:2]
        self._task = asyncio.create_task(self._answer(method, path.split("?")[0], body))

    async def _answer(self, method: str, path: str, body: bytes) -> None:
        if method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            try:
                self._key = await self._server.start(json.loads(body), path.endswith("chat/completions"), self)
            except (ValueError, KeyError, TypeError, EngineRefused) as error:
                self._send_response(400, {"error": {"message": str(error), "type": "invalid_request_error"}})
        elif path == "/v1/models":
            self._send_response(200, {"object": "list", "data": [{"id": self._server.model, "object": "model"}]})
        elif path in ("/health", "/ping", "/ready"):
            self._send_response(200, {})
        else:
            self._send_response(404, {"error": {"message": f"no {path} here", "type": "not_found"}})

    def _send_response(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        if self._transport is not None:
            self._transport.write(head.encode() + data)

    def head(self) -> None:
        """Send the head of a stream of events."""
        if self._transport is not None:
            self._transport.write(STREAM_HEAD)

    def chunk(self, data: bytes, last: bool = False) -> None:
        """Send a piece of the stream. With `last`, end the stream."""
        if last:
            self._key = ""
        if self._transport is not None:
            end = b"\r\n0\r\n\r\n" if last else b"\r\n"
            self._transport.write(b"%x\r\n%b%b" % (len(data), data, end))


async def serve(arguments: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    engine = SimEngine(SimConfig.from_source(arguments.source))
    await engine.start()
    server = Server(engine, TextModel.from_bundle(Bundle.load(Path(arguments.bundle))), arguments.model)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stepping = asyncio.create_task(server.run())
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", arguments.port, backlog=1024)
    async with listening:
        await stop.wait()
    stepping.cancel()


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    for name in ("model", "bundle", "source"):
        parser.add_argument(f"--{name}", required=True)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
