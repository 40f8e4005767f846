"""Cost of refused requests by size, over HTTP and gRPC, for every field that can hold much data.

The CPU time is the CPU time of the gateway and its helper processes together. A piece of event-loop work is work during
which nothing else runs on the loop. The length of a piece is the time by which the loop was late while the gateway's
process used CPU. The length is measured on a second gateway, because the measurement itself takes a twentieth of a
core.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc.aio
import psutil

from cluster.v1 import inference_pb2 as pb
from loadtests.children import Child
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours

BY_BYTES = "CPU of a refused request of 1 and 16 MB, by bytes, every list field, worst"
SMALL = "CPU of a refused request of 64 KB, every list field, worst"
LINEAR = "CPU of a refused request of 16 MB against sixteen times that of 1 MB, worst"
PIECE = "longest piece of event-loop work meanwhile"
ROWS: Mapping[str, Bound] = {
    BY_BYTES: Bound("<=", 20),
    SMALL: Bound("<=", 10),
    LINEAR: Bound("<=", 1.2),
    PIECE: Bound("<=", 10),
}

KIB, MIB = 1 << 10, 1 << 20
SIZES: Final = {KIB: 5, 64 * KIB: 4, MIB: 3, 16 * MIB - 4096: 1}
"""Number of requests to send, by size of the body in bytes."""
SERVICE: Final = "/cluster.v1.Inference/"
ANSWER_S: Final = 60.0
SETTLE_S: Final = 0.05
TIME_S: Final = 110.0
"""Time in seconds after which no further body is begun."""


@dataclass(frozen=True, slots=True)
class Attack:
    """A kind of hostile request. `body(size)`: makes a body of this size. `method`: an HTTP path or a gRPC method."""

    name: str
    method: str
    body: Callable[[int], bytes]


def repeated(before: bytes, part: bytes, after: bytes) -> Callable[[int], bytes]:
    """Return a function that makes a body of at most a given size, with as many copies of `part` as possible."""
    return lambda size: before + part * ((size - len(before) - len(after)) // len(part)) + after


def numbered(before: bytes, part: Callable[[int], bytes], after: bytes) -> Callable[[int], bytes]:
    """Return a function that makes a body of about a wanted size: `before`, then parts until the size is reached, then
    `after`. `part` makes a part from the part's number."""

    def body(size: int) -> bytes:
        parts, remaining, number = [before], size - len(before) - len(after), 0
        while remaining > 0:
            parts.append(part(number))
            remaining -= len(parts[-1])
            number += 1
        return b"".join(parts)[:-1] + after

    return body


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
GOOD = b'"model":"%s","messages":[{"role":"user","content":"hi"}]' % ours.MODEL.encode()
WRONG = b',"temperature":9}'
TEXT = b'{"model":"%s","prompt":"' % ours.MODEL.encode()


def field(name: str, opening: bytes, part: bytes, closing: bytes) -> Attack:
    """Return an attack: a chat request whose field `name` holds much data, and which has a second field that is
    invalid.

    The data is `part`, repeated many times between `opening` and `closing`.
    """
    before = b"{" + GOOD + b',"' + name.encode() + b'":' + opening
    return Attack(f"{name} {part.decode('latin-1')[:12]}", CHAT, repeated(before, part, closing + WRONG))


def members(name: str, part: Callable[[int], bytes]) -> Attack:
    """Return an attack: a chat request with one object field that has many members, and another field that is wrong."""
    before = b"{" + GOOD + b',"' + name.encode() + b'":{'
    return Attack(f"{name} members", CHAT, numbered(before, part, b"}" + WRONG))


def attacks_over_http() -> Sequence[Attack]:
    """Return the attacks on HTTP bodies: every field that can contain much data is attacked."""
    ids = b'{"model":"%s","prompt":[' % ours.MODEL.encode()
    return (
        field("stop", b"[", b'"",', b'""]'),
        field("stop_token_ids", b"[", b"-1,", b"-1]"),
        field("unknown", b"[", b"[],", b"[]]"),
        field("chat_template_kwargs", b'{"x":[', b"[],", b"[]]}"),
        field("chat_template_kwargs", b'{"x":"', b"word ", b'"}'),
        field("tools", b"[", b"{},", b"{}]"),
        field("model2", b'"', b"x", b'"'),
        field("model", b'"', b"x", b'"'),
        field("user", b"", b"[", b""),
        field("structured_outputs", b'{"choice":[', b'"",', b'""]}'),
        field("response_format", b'{"type":"', b"x", b'"}'),
        members("logit_bias", lambda number: b'"%d":1000,' % number),
        members("metadata", lambda number: b'"%d":"x",' % number),
        members("unknown", lambda number: b'"%d":1,' % number),
        Attack("messages", CHAT, repeated(b'{"messages":[', b'{"role":"user","content":"hello there"},', b"{}]}")),
        Attack("messages []", CHAT, repeated(b'{"messages":[', b"{},", b"{}]}")),
        Attack("content parts", CHAT, repeated(
            b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""},', b"5]}]}")),
        Attack("tool arguments", CHAT, repeated(
            b'{"messages":[{"role":"assistant","tool_calls":[{"function":{"arguments":"[', b"[],", b'"}}]}]}')),
        Attack("unknown fields", CHAT, numbered(b"{", lambda number: b'"a%07d":1,' % number, b"}")),
        Attack("deep", CHAT, repeated(b'{"messages":', b"[", b"")),
        Attack("spaces", CHAT, repeated(b"{", b" ", b"")),
        Attack("digits", CHAT, repeated(b'{"seed":', b"9", b"}")),
        Attack("no UTF-8", CHAT, repeated(b'{"model":"', b"\xed\xa0\x80", b'"}')),
        Attack("prompt ids", COMPLETE, repeated(ids, b"1,", b"-1]}")),
        Attack("prompts", COMPLETE, repeated(ids, b'"a",', b'""]}')),
        Attack("prompts of ids", COMPLETE, repeated(ids, b"[1],", b"[]]}")),
        Attack("text", COMPLETE, repeated(TEXT, b"word ", b'"' + WRONG)),
        Attack("text of two bytes a character", COMPLETE, repeated(TEXT, "я".encode(), b'"' + WRONG)),
        Attack("text of escapes", COMPLETE, repeated(TEXT, b"\\u00e4", b'"' + WRONG)),
    )  # fmt: skip


def wire(before: Any, part: bytes) -> Callable[[int], bytes]:
    """Return a function that makes a body of at most a given size: the serialized message `before`, then as many copies
    of `part` as possible.
    """
    return repeated(before.SerializeToString(), part, b"")


def attacks_over_grpc() -> Sequence[Attack]:
    """Return the attacks on every field of a gRPC message that can hold much data."""
    wrong = pb.ChatRequest(model=ours.MODEL, temperature=9, messages=[pb.Message(role="user", content="x")])
    user = b"\x12\x13\x0a\x04user\x12\x0bhello there"
    biases = b"\x82\x01\x07\x08\x05\x15\x00\x00\x80\x7f"
    varints = pb.CompleteRequest(model=ours.MODEL, temperature=9)

    def packed(head: Any, tag: bytes) -> Callable[[int], bytes]:
        def body(size: int) -> bytes:
            length = size - 64
            out, rest = bytearray(tag), length
            while rest > 127:
                out.append(rest & 127 | 128)
                rest >>= 7
            return bytes(head.SerializeToString() + out + bytes([rest])) + b"\x01" * length

        return body

    def text(kind: Any, name: str, part: str, **more: Any) -> Callable[[int], bytes]:
        return lambda size: kind(**{name: part * ((size - 64) // len(part.encode()))}, **more).SerializeToString()

    return (
        Attack("messages", "Chat", wire(wrong, user)),
        Attack("empty messages", "Chat", wire(wrong, b"\x12\x00")),
        Attack("stop", "Chat", wire(wrong, b"\x52\x00")),
        Attack("stop_token_ids", "Chat", packed(wrong, b"\x5a")),
        Attack("logit_bias", "Chat", wire(wrong, biases)),
        Attack("metadata", "Chat", wire(wrong, b"\xfa\x01\x03\x0a\x01x")),
        Attack("tools", "Chat", wire(wrong, b"\xaa\x01\x00")),
        Attack("unknown", "Chat", wire(wrong, b"\xc0\x3e\x01")),
        Attack("malformed", "Chat", repeated(b"", b"\xff", b"")),
        Attack("arguments", "Chat", text(pb.ChatRequest, "chat_template_kwargs_json", "[[],[]],", model="x")),
        Attack("prompt ids", "Complete", packed(varints, b"\xa2\x06")),
        Attack("text", "Complete", text(pb.CompleteRequest, "prompt", "word ", model=ours.MODEL, temperature=9)),
        Attack("text of two bytes a character", "Complete",
               text(pb.CompleteRequest, "prompt", "я", model=ours.MODEL, temperature=9)),
        Attack("tokens", "Resume", wire(pb.ResumeRequest(complete=varints), b"\x12\x00")),
        Attack("ids to text", "Detokenize", packed(pb.DetokenizeRequest(model="none"), b"\x12")),
        Attack("name", "GetModel", text(pb.GetModelRequest, "name", "x")),
    )  # fmt: skip


class Target:
    """A gateway under attack. `witness`: the file to which another process writes how long the gateway's event loop was
    busy."""

    def __init__(self, gateway: ours.Ours, witness: Path) -> None:
        self.gateway = gateway
        self._witness = witness

    @property
    def _process(self) -> psutil.Process:
        child: Child = self.gateway.gateway
        return child.commands()[0]

    def cpu_s(self) -> float:
        """Return the CPU time of the gateway and the gateway's helpers so far, with nanosecond resolution where the
        kernel provides it.
        """
        return sum(map(_cpu_s, [self._process, *self._process.children(recursive=True)]))

    async def piece_ms(self) -> float:
        """Return the longest piece of event-loop work since the last call, in milliseconds."""
        self._witness.unlink(missing_ok=True)
        self._process.send_signal(signal.SIGUSR1)
        while not self._witness.exists():  # noqa: ASYNC110 - another process's file is no event
            await asyncio.sleep(0.01)
        return float(json.loads(self._witness.read_text())["busy_s"]) * 1000

    async def send(self, attack: Attack, body: bytes, channel: grpc.aio.Channel) -> None:
        """Send one request, which the gateway must refuse. Raises RuntimeError if the gateway does not refuse it."""
        if attack.method.startswith("/"):
            await self._post(attack, body)
            return
        call: Any = channel.unary_stream(SERVICE + attack.method)
        if attack.method in ("Complete", "Chat", "GetModel", "Detokenize"):
            call = channel.unary_unary(SERVICE + attack.method)
        try:
            answer = call(body, metadata=self.gateway.metadata, timeout=ANSWER_S)
            if hasattr(answer, "__aiter__"):
                async for _ in answer:
                    pass
            else:
                await answer
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise RuntimeError(f"{attack.name}, {len(body)} bytes: {error.code()} {error.details()}") from None
            return
        raise RuntimeError(f"{attack.name}, {len(body)} bytes: was not refused")

    async def _post(self, attack: Attack, body: bytes) -> None:
        host, _, port = self.gateway.endpoints["http"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {attack.method} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
        head += f"authorization: Bearer {self.gateway.key}\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        async with asyncio.timeout(ANSWER_S):
            status = int((await reader.readline()).split()[1])
        writer.close()
        if not 400 <= status < 500:
            raise RuntimeError(f"{attack.name}, {len(body)} bytes: answered {status}")


def _cpu_s(process: psutil.Process) -> float:
    try:
        tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except (OSError, ValueError):
        return 0.0


async def cost_s(target: Target, attack: Attack, body: bytes, times: int, channel: grpc.aio.Channel) -> float:
    """Return the mean CPU time of one request of this attack, in seconds."""
    before = target.cpu_s()
    for _ in range(times):
        await target.send(attack, body, channel)
    await asyncio.sleep(SETTLE_S)  # a helper may still release what it has read
    return (target.cpu_s() - before) / times


Visit = Callable[[Target, Attack, bytes, int, grpc.aio.Channel], Awaitable[None]]


async def attack_all(stage: Stage, name: str, source: str, bundle: Path, witness: Path | None, visit: Visit) -> None:
    """Start a gateway, and send it every attack in every size, the small sizes first. Raises TimeoutError."""
    stalls = ("--stalls", str(witness)) if witness is not None else ()
    gateway = await ours.start(stage.children, stage.folder, bundle=bundle, source=source, name=name, witness=stalls)
    target = Target(gateway, witness or stage.folder)
    attacks = [*attacks_over_http(), *attacks_over_grpc()]
    async with grpc.aio.insecure_channel(gateway.grpc, options=(("grpc.max_send_message_length", -1),)) as channel:
        for attack in attacks[:1] + attacks[-1:]:  # starts the helpers and imports everything
            await target.send(attack, attack.body(2 * MIB), channel)
        await asyncio.sleep(2.0)
        if witness is not None:
            await target.piece_ms()  # discards earlier work
        until = time.monotonic() + TIME_S
        for size, times in SIZES.items():
            for attack in attacks:
                if time.monotonic() > until:
                    raise TimeoutError(f"{attack.name}, {size} bytes: was not sent within {TIME_S:g} s")
                await visit(target, attack, attack.body(size), times, channel)


async def measure(stage: Stage) -> list[Figure]:
    """Measure the cost of refused requests: their CPU time on one gateway, and how long they block the event loop of
    another gateway. Return the report's rows."""
    model, bundle = await ours.prepare(stage.children, "tokenizer", stage.folder)
    source = f"sim://{model}"
    costs: dict[tuple[str, str], dict[int, float]] = {}
    worst, small, ratio, piece = (0.0, ""), (0.0, ""), (0.0, ""), (0.0, "")

    async def cost(target: Target, attack: Attack, body: bytes, times: int, channel: grpc.aio.Channel) -> None:
        nonlocal worst, small, ratio
        size = len(body)
        used_s = await cost_s(target, attack, body, times, channel)
        note = f"{attack.name} ({attack.method}), {size} bytes: {used_s * 1000:.2f} ms"
        measured = costs.setdefault((attack.name, attack.method), {})
        if size >= MIB // 2:
            worst = max(worst, (used_s / size * 1e9, note))
            if measured and max(measured) >= MIB // 2:
                smaller = max(measured)
                ratio = max(ratio, (used_s / measured[smaller] * smaller / size, note))
        else:
            small = max(small, (used_s * 1000, note))
        measured[size] = used_s

    async def longest(target: Target, attack: Attack, body: bytes, times: int, channel: grpc.aio.Channel) -> None:
        nonlocal piece
        for _ in range(times):
            await target.send(attack, body, channel)
        await asyncio.sleep(SETTLE_S)
        note = f"{attack.name} ({attack.method}), {len(body)} bytes"
        piece = max(piece, (await target.piece_ms(), note))

    await attack_all(stage, "refusals", source, bundle, None, cost)
    await attack_all(stage, "refusals-witnessed", source, bundle, stage.folder / "refusals.stalls", longest)
    stage.report.settings["refused requests, CPU ms by bytes"] = {
        f"{name} ({method})": [round(used_s * 1000, 3) for used_s in by_size.values()]
        for (name, method), by_size in costs.items()
    }
    return [
        exact(BY_BYTES, worst[0], ROWS[BY_BYTES], "ns/byte", worst[1]),
        exact(SMALL, small[0], ROWS[SMALL], "ms", small[1]),
        exact(LINEAR, ratio[0], ROWS[LINEAR], "", ratio[1]),
        exact(PIECE, piece[0], ROWS[PIECE], "ms", piece[1]),
    ]
