"""Connections of a worker or controller to gateways. A lost connection is made again after a growing pause. Heartbeats
are sent from separate threads.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import structlog

from cluster.http2.client import CallEnded, GrpcClient, connect
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.tls import TlsFiles

log = structlog.get_logger("link")

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
CHUNK_BYTES = 1024 * 1024
DIAL_S = 20.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # one TCP connection for each kind of stream
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Intervals of a link, in seconds."""

    beat_s: float = 0.1
    silence_s: float = 5.0
    """Time without a beat or message after which a worker considers its gateway lost. A gateway applies the same time
    to a worker that has not sent a beat yet."""
    hang_s: float = 0.5
    """Time after which a gateway considers a stalled worker lost. The limit is higher if five engine steps take longer
    (liveness.py)."""
    redial_min_s: float = 0.1
    redial_max_s: float = 2.0
    welcome_s: float = 5.0


class LinkEnded(Exception):
    """Error: a session with the other side has ended. The message is the reason."""


def open_channel(address: str, tls: TlsFiles | None) -> grpc.aio.Channel:
    """Open a channel with its own TCP connection to `host:port`. Raises LinkEnded if the TLS files cannot be read."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, _credentials(tls), options=CHANNEL_OPTIONS)


def _credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Return credentials made from the current content of the certificate files, so that a reconnect uses a renewed
    certificate."""
    try:
        return tls.channel_credentials()
    except ValueError as error:  # the files may be half renewed: the next attempt reads them again
        raise LinkEnded(str(error)) from None


@asynccontextmanager
async def open_client(address: str, tls: TlsFiles | None) -> AsyncIterator[GrpcClient]:
    """Connect to `host:port` with the HTTP/2 client of cluster.http2. Raises LinkEnded if the connection fails."""
    try:
        async with asyncio.timeout(DIAL_S):
            context = None if tls is None else tls.context()
            client = await connect(address, context, max_message_bytes=MAX_MESSAGE_BYTES)
    except TimeoutError:
        raise LinkEnded(f"UNAVAILABLE: no connection within {DIAL_S:g} s") from None
    except (OSError, ValueError) as error:
        raise LinkEnded(f"UNAVAILABLE: {error}") from None
    async with client:
        yield client


async def read(call: Any) -> Any:
    """Return the next message of a stream; None at the end of the stream. `call` is typed as Any, because the type
    stubs declare grpc.aio.EOF as a plain object."""
    message = await call.read()
    return None if message is grpc.aio.EOF else message


async def wait_first(parts: list[asyncio.Task[None]]) -> None:
    """Wait until the first of the tasks in `parts` ends. Raise its exception, if it has one.

    An exception refers to the frames through which it has passed. If such a frame refers to the failed task, there is a
    reference cycle, which keeps connections open until the garbage collector runs. So this function deletes its own
    references to the tasks, and the caller must empty the list `parts` afterwards.
    """
    done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    try:
        for part in done:
            part.result()
    finally:
        del done, part, parts


async def keep_dialing(
    address: str,
    session: Callable[[str], Awaitable[None]],
    timing: Timing,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Run `session(address)` again and again while `wanted()` is true. The pause before the next session grows if
    sessions end soon after their start."""
    pause_s = timing.redial_min_s
    logged_reason = ""
    while wanted():
        started = time.monotonic()
        try:
            await session(address)
            why = "closed by the gateway"
        except LinkEnded as ended:
            why = str(ended)
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        except CallEnded as error:
            why = str(error)
        except (asyncio.InvalidStateError, TimeoutError):  # a write after the call's end, or no answer to the Hello
            why = "the connection to the gateway was lost"
        if time.monotonic() - started > 5 * timing.redial_max_s:
            pause_s = timing.redial_min_s
        if why != logged_reason:
            log.warning("link.disconnected", gateway=address, reason=why)
            logged_reason = why
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads redials, no secret
        pause_s = min(pause_s * 1.5, timing.redial_max_s)


class HeartbeatSender:
    """Heartbeats of one link. Separate threads send them, so that a blocked event loop or a long engine step does not
    delay them. If the stream of heartbeats breaks, another one is opened, and the link goes on.

    `beat(seq)`: builds a heartbeat. It runs in one of these threads and must not block. A heartbeat that it fails to
    build is left out.
    """

    def __init__(
        self, address: str, tls: TlsFiles | None, beat: Callable[[int], pb.WorkerBeat], interval_s: float
    ) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self._stop = threading.Event()
        self.last_heard = time.monotonic()
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, _credentials(tls), options=CHANNEL_OPTIONS)
        self._thread = threading.Thread(target=self._run, name=f"beat-{address}", daemon=True)
        self._thread.start()

    def _beats(self) -> Iterator[pb.WorkerBeat]:
        seq = 0
        failed = False
        while not self._stop.is_set():
            seq += 1
            try:
                beat = self._beat(seq)
            except Exception:  # it would end the stream, and so the link
                if not failed:  # once for each stream, not ten times a second
                    log.exception("link.beat_failed")
                failed = True
            else:
                yield beat
            self._stop.wait(self._interval_s)

    def _run(self) -> None:
        stub = pb_grpc.LinkStub(self._channel)
        while not self._stop.is_set():
            try:
                for _ in stub.Beat(self._beats()):
                    self.last_heard = time.monotonic()
            except grpc.RpcError:
                pass  # if no gateway answers any more, the worker sees it by `silent_s` and ends the link
            except ValueError:
                return  # the channel is closed
            self._stop.wait(self._interval_s)

    @property
    def silent_s(self) -> float:
        """Seconds since the last heartbeat of the gateway."""
        return time.monotonic() - self.last_heard

    def stop(self) -> None:
        """End the threads and the connection."""
        self._stop.set()
        self._channel.close()
