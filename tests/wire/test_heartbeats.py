"""The heartbeats of a link, which go on after a broken stream and after a heartbeat that could not be built."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.dial import HeartbeatSender

PER_STREAM = 3
WITHIN_S = 20.0


class _Gateway(pb_grpc.LinkServicer):
    """A gateway that breaks each stream of heartbeats after PER_STREAM answers."""

    def __init__(self) -> None:
        self.streams = 0
        self.heard: list[int] = []
        self.enough = threading.Event()
        self.first = threading.Event()

    def Beat(
        self, request_iterator: Iterator[pb.WorkerBeat], context: grpc.ServicerContext
    ) -> Iterator[pb.GatewayBeat]:
        """Answer PER_STREAM heartbeats, then end the call with an error."""
        self.streams += 1
        for _, beat in zip(range(PER_STREAM), request_iterator, strict=False):
            self.heard.append(beat.seq)
            yield pb.GatewayBeat(seq=beat.seq)
            self.first.set()
        if self.streams == 3:
            self.enough.set()
        context.abort(grpc.StatusCode.UNAVAILABLE, "broken")


@contextmanager
def _serving(gateway: _Gateway) -> Iterator[str]:
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        pb_grpc.add_LinkServicer_to_server(gateway, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


def test_heartbeats_go_on_after_a_broken_stream() -> None:
    """If the stream of heartbeats breaks, the sender opens another one; the gateway's beats are heard again."""
    gateway = _Gateway()  # type: ignore[abstract]
    with _serving(gateway) as address:
        sender = HeartbeatSender(address, None, lambda seq: pb.WorkerBeat(seq=seq), 0.005)
        try:
            assert gateway.first.wait(WITHIN_S)
            began = sender.last_heard
            assert gateway.enough.wait(WITHIN_S), "three streams are opened"
            assert sender.last_heard > began
        finally:
            sender.stop()


def test_a_heartbeat_that_fails_is_left_out() -> None:
    """If a heartbeat cannot be built, the next ones are sent on the same stream."""

    def beat(seq: int) -> pb.WorkerBeat:
        if seq == 2:
            raise ValueError("Value out of range: -1")
        return pb.WorkerBeat(seq=seq)

    gateway = _Gateway()  # type: ignore[abstract]
    with _serving(gateway) as address:
        sender = HeartbeatSender(address, None, beat, 0.005)
        try:
            assert gateway.enough.wait(WITHIN_S)
        finally:
            sender.stop()
    assert gateway.heard[:PER_STREAM] == [1, 3, 4]
