"""Floods of each kind of frame, without and with a tenant's key. The test measures whether the gateway cuts the
connection, and the gateway's CPU time until the cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from loadtests.figures import Bound, Figure
from loadtests.hostile.attacker import Attacker
from loadtests.hostile.ports import ATTACKER, Attacked, attacked
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact

ROW = "kinds of frame floods not cut within 1 s of the gateway's CPU"
ROWS: Mapping[str, Bound] = {ROW: Bound("<=", 0)}
CPU_S, WALL_S, WRITE_BYTES = 1.0, 15.0, 65_536
RUNNING, ENDED = 1001, 3
"""Ids of two streams in the frames below: a running call of a tenant, and a call that has ended."""


def repeated(frame: Frame | bytes) -> Callable[[Attacker], bytes]:
    """Return a function that repeats the same frame."""
    data = frame if isinstance(frame, bytes) else frame.serialize()
    return lambda attacker: data * (WRITE_BYTES // len(data) + 1)


def calls(make: Callable[[Attacker], bytes], count: int = 300) -> Callable[[Attacker], bytes]:
    """Return a function that returns the bytes of `count` new calls. `make`: returns the bytes of one call."""
    return lambda attacker: b"".join(make(attacker) for _ in range(count))


def reset(attacker: Attacker) -> bytes:
    """Return the frames that open a call and reset the call (rapid reset)."""
    return attacker.open("Chat") + RstStreamFrame(attacker.last).serialize()


def made_to_reset(attacker: Attacker) -> bytes:
    """Return the frames that open a call that the server must reset (MadeYouReset)."""
    return attacker.open("Chat", end=True) + WindowUpdateFrame(attacker.last, 2**31 - 1).serialize()


def endless_block(part: bytes) -> Callable[[Attacker], bytes]:
    """Return a function that makes a header block without an end: a HEADERS frame, followed by CONTINUATION frames that
    all hold `part`."""
    return lambda attacker: (
        HeadersFrame(attacker.last + 2, b"").serialize()
        + repeated(ContinuationFrame(attacker.last + 2, part))(attacker)
    )


KINDS: Mapping[str, Callable[[Attacker], bytes]] = {
    "empty DATA": repeated(DataFrame(RUNNING)),
    "DATA of one byte": repeated(DataFrame(RUNNING, b"\x00")),
    "DATA on an ended stream": repeated(DataFrame(ENDED, b"x")),
    "WINDOW_UPDATE": repeated(WindowUpdateFrame(0, 1)),
    "WINDOW_UPDATE of a stream": repeated(WindowUpdateFrame(RUNNING, 1)),
    "WINDOW_UPDATE of an ended stream": repeated(WindowUpdateFrame(ENDED, 1)),
    "PRIORITY": repeated(PriorityFrame(RUNNING, depends_on=5)),
    "unknown": repeated(b"\x00\x00\x04\x77\x00\x00\x00\x00\x00abcd"),
    "ALTSVC": repeated(b"\x00\x00\x02\x0a\x00\x00\x00\x00\x01\x00\x00"),
    "PING": repeated(PingFrame(0, b"12345678")),
    "PING ACK": repeated(PingFrame(0, b"12345678", flags=("ACK",))),
    "SETTINGS": repeated(SettingsFrame(0)),
    "SETTINGS ACK": repeated(SettingsFrame(0, flags=("ACK",))),
    "RST_STREAM of an ended stream": repeated(RstStreamFrame(ENDED)),
    "GOAWAY of the largest frame": repeated(GoAwayFrame(0, additional_data=b"x" * 16_000)),
    "rapid reset": calls(reset),
    "MadeYouReset": calls(made_to_reset),
    "unknown methods": calls(lambda attacker: attacker.open("None", end=True)),
    "what is no gRPC": calls(lambda attacker: attacker.open("Chat", verb="GET", end=True)),
    "no request": calls(lambda attacker: attacker.open("Chat", end=True)),
    "CONTINUATION, empty": endless_block(b""),
    "CONTINUATION, large": endless_block(b"x" * 16_000),
    "table size updates": lambda attacker: HeadersFrame(
        attacker.last + 2, b"\x20" * 1000, flags=("END_HEADERS", "END_STREAM")
    ).serialize(),
}


def flood(gateway: Attacked, kind: str, key: str) -> tuple[bool, float]:
    """Flood the gateway. Return whether the connection was cut, and the CPU time until the cut."""
    attacker = Attacker(gateway.address, key)
    try:
        attacker.send(attacker.open("/grpc.health.v1.Health/Check") + attacker.message(attacker.last, b"", end=True))
        while attacker.last + 2 < RUNNING:
            attacker.head(b"")  # skips stream numbers
        attacker.send(attacker.open("Session" if key else "/grpc.health.v1.Health/Watch"))
        before, deadline = gateway.cpu_s(), time.monotonic() + WALL_S
        while attacker.send(KINDS[kind](attacker)):
            if gateway.cpu_s() - before > CPU_S or time.monotonic() > deadline:
                return False, gateway.cpu_s() - before
        return True, gateway.cpu_s() - before
    finally:
        attacker.close()


async def measure(stage: Stage) -> list[Figure]:
    """Run each kind of flood, once without and once with a key; return the report's rows."""
    gateway = await attacked(stage, "floods-gateway")
    missed, costs = [], []
    for kind in KINDS:
        for who, key in (("stranger", ""), ("tenant", gateway.keys[ATTACKER])):
            cut, cpu_s = await asyncio.to_thread(flood, gateway, kind, key)
            costs.append(f"{kind} ({who}) {cpu_s:.2f}")
            if not cut or cpu_s > CPU_S:
                missed.append(f"{kind} ({who})")
    note = "not cut: " + ", ".join(missed) + "; " if missed else ""
    return [exact(ROW, len(missed), ROWS[ROW], "", note + "CPU seconds: " + ", ".join(costs))]
