"""Accepts the connections of one listening socket, within the caps of its port.

asyncio's own accept loop takes the whole backlog in one pass, has no cap, and logs a traceback for each connection of
the backlog when no descriptor is left.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from asyncio import sslproto
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

from cluster.http2.connection_table import MAX_CONNECTIONS, ConnectionStage, Held, Pool
from cluster.http2.limited_log import LimitedLog

ACCEPTS_A_PASS: Final = 8
"""Connections accepted before the event loop turns to others; so many descriptors may be in use beyond the cap, since
a connection that makes room for another is closed in the next pass."""
PAUSE_S: Final = 0.5
"""Without accepting, when no descriptor or memory is left."""
HANDSHAKE_S: Final = 10.0
"""For TLS."""
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: close with a reset."""

TLS_BUFFER_BYTES: Final = 16_384
"""Encrypted bytes that a connection holds, twice: where asyncio reads to, which it keeps, and what waits to be read."""
if not hasattr(sslproto.SSLProtocol, "max_size"):
    raise RuntimeError("asyncio's TLS has no SSLProtocol.max_size: this Python is newer than those that are supported")
sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES  # instead of 256 KiB, of a thousand idle strangers 256 MiB


class _SecureTransport(Protocol):
    """What asyncio's transport of a TLS connection has beside others' methods."""

    def set_read_buffer_limits(self, high: int) -> None:
        """Read no more while so many bytes are not decrypted."""


Factory = Callable[[Held], asyncio.BaseProtocol]
BACKLOG: Final = 2048
"""Connections that wait for a pass of the loop."""


def listening(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket that queues connections. `shared`: other processes may bind it too. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
    # Accepted sockets inherit it; without it a second call's tokens wait for ACKs.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


@dataclass(frozen=True, slots=True)
class ConnectionAdmission:
    """Where a listener's connections are counted, and refusals are reported."""

    pool: Pool = field(default_factory=lambda: Pool(MAX_CONNECTIONS))
    notices: LimitedLog = field(default_factory=LimitedLog)


class Listener:
    """A socket that accepts from `start` to `close`.

    The protocol sets `Held.connection` once its connection is made, drops the connection there and then where the place
    is lost already, and releases the place when the connection is lost.
    """

    def __init__(
        self,
        sock: socket.socket,
        factory: Factory,
        admission: ConnectionAdmission,
        tls: ssl.SSLContext | None = None,
        shutdown_s: float | None = None,
    ) -> None:
        """`shutdown_s`: how long the end of TLS may take, what is unsent included; None: asyncio's half a minute."""
        self._sock = sock
        self._factory = factory
        self._pool = admission.pool
        self._notices = admission.notices
        self._tls = tls
        self._shutdown_s = None if tls is None else shutdown_s
        self._loop = asyncio.get_running_loop()
        self._beginning: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Accept."""
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more; connections that have not begun are dropped. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._beginning:
            task.cancel()

    def _accept(self) -> None:
        self._pool.passes += 1
        for _ in range(ACCEPTS_A_PASS):
            if (wait_s := self._pool.wait_s(self._loop.time())) > 0:
                self._rest(wait_s)
                return
            try:
                connected, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._notices.count("no_descriptor_left")
                    self._rest(PAUSE_S)
                    return
                continue  # the client has gone meanwhile
            self._admit(connected, str(address[0]) if isinstance(address, tuple) else "")

    def _rest(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(seconds, self.start)

    def _admit(self, connected: socket.socket, address: str) -> None:
        held, victim = self._pool.admit(address, self._loop.time())
        if victim is not None:
            self._notices.count("closed_for_others")
            if victim.connection is not None:
                victim.connection.shed()
        if held is None:
            self._notices.count("port_full")
            with suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connected.close()
            return
        connected.setblocking(False)
        beginning = _Beginning(self._loop, held)
        held.connection = beginning
        task = self._loop.create_task(self._begin(connected, held))
        beginning.task = task
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, connected: socket.socket, held: Held) -> None:
        """Hand the connection to a protocol, for TLS after the handshake."""
        secure = self._tls is not None
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: self._factory(held),
                connected,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_S if secure else None,
                ssl_shutdown_timeout=self._shutdown_s,
            )
            if secure:
                cast(_SecureTransport, transport).set_read_buffer_limits(TLS_BUFFER_BYTES)
        except OSError:  # a failed handshake, a client that has gone
            held.release()
        except BaseException:
            held.release()
            raise


class _Beginning:
    """A connection before its protocol has it."""

    stage = ConnectionStage.SILENT
    requests = 0

    def __init__(self, loop: asyncio.AbstractEventLoop, held: Held) -> None:
        self.task: asyncio.Task[None] | None = None
        self._loop = loop
        self._held = held

    def shed(self, passes: int = 3) -> None:
        """Drop it, once asyncio has got so far that a cancelled connection closes its socket: that takes three passes
        of the loop."""
        if passes:
            self._loop.call_soon(self.shed, passes - 1)
        elif self.task is not None:
            self.task.cancel()
            if self._held.connection is not None and self._held.connection is not self:
                self._held.connection.shed()
