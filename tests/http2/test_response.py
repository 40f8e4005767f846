"""Tests of the order of a call's frames: the server sends no data of a call after the call's status."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.http2 import frames
from cluster.http2.output import ConnectionCore
from cluster.http2.response import ResponseWriter
from tests.support.transports import Sink

DATA, HEADERS = 0, 1


def kinds(data: bytes) -> list[int]:
    """Return the types of the frames in `data`."""
    found = []
    while data:
        found.append(data[3])
        data = data[9 + int.from_bytes(data[:3], "big") :]
    return found


@pytest.mark.slow
async def test_no_data_follows_the_status() -> None:
    """No data is sent after the final status. If sending the status closes the connection, data that was gathered for
    the same write is dropped. A frame after the end of a stream would be an error of the whole connection."""
    sink = Sink()
    slot: Any = SimpleNamespace(mark_authenticated=lambda: None)
    core = ConnectionCore(cast(Any, sink), slot, cast(Any, SimpleNamespace()), cast(Any, None), lambda: None)
    core.h2.initiate_connection()
    core.h2.output()
    stream: Any = SimpleNamespace(
        stream_id=1,
        outbound_flow_control_window=65_535,
        state_machine=SimpleNamespace(process_input=lambda event: None),
    )
    request: Any = SimpleNamespace(half_closed=True)
    answer = ResponseWriter(core, stream, "/service/Method", request, lambda stream_id: core.output.close())
    answer.send(b"first")
    await asyncio.sleep(0)
    assert kinds(sink.writes.pop()) == [HEADERS, DATA]
    core.output.call_before_flush(lambda: answer.send(b"gathered"))
    answer.send_status(frames.literal(b"grpc-status", b"14"))
    await asyncio.sleep(0)
    assert kinds(b"".join(sink.writes)) == [HEADERS]
    assert sink.closing
