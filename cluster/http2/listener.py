"""A listening socket that limits the number of its port's connections.

asyncio's own accept loop takes the whole backlog in one pass and has no limit. When no descriptor is left, asyncio's
loop logs a traceback for each waiting connection.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import struct
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

import structlog

from cluster.http2.connection_table import MAX_CONNECTIONS, ConnectionSlot, ConnectionStage, Pool

log = structlog.get_logger("connections")

ACCEPTS_A_PASS: Final = 8
"""Maximum number of connections accepted in one event-loop pass. The number of descriptors in use may exceed the cap by
this number, because a replaced connection is closed in the next pass."""
PAUSE_S: Final = 0.5
"""Pause before the next accept in seconds, when no descriptor or memory is left."""
HANDSHAKE_S: Final = 10.0
"""Time limit of the TLS handshake, in seconds."""
_EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER value with which closing a socket resets the connection."""

TLS_BUFFER_BYTES: Final = 16_384
"""Size in bytes of each of the two buffers that a connection has for encrypted bytes: asyncio's permanent read buffer,
and the buffer of received bytes."""
if not hasattr(sslproto.SSLProtocol, "max_size"):
    raise RuntimeError("asyncio's TLS has no SSLProtocol.max_size: this Python is newer than the supported versions")
sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES  # asyncio's 256 KiB would take 256 MiB for a thousand idle clients


class _SecureTransport(Protocol):
    """An asyncio TLS transport. Unlike other transports, it has the method `set_read_buffer_limits`."""

    def set_read_buffer_limits(self, high: int) -> None:
        """Pause reading while more than `high` bytes wait to be decrypted."""


Factory = Callable[[ConnectionSlot], asyncio.BaseProtocol]
LOG_INTERVAL_S: Final = 1.0
BACKLOG: Final = 2048
"""Maximum number of connections that wait to be accepted."""


def listening_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """Create a listening socket. `shared`: other processes may bind the port too. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=shared)
    # Accepted sockets inherit TCP_NODELAY. Without this option, the tokens of a second call wait for ACKs.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class LimitedLog:
    """A log that counts events by reason and writes all counts in one line, at most once a second."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, reason: str) -> None:
        """Count one event under `reason`; all counts are logged at most once a second."""
        self._counts[reason] += 1
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait_s = self._next_at - loop.time()
        if wait_s <= 0:
            self._write()
        else:
            self._timer = loop.call_later(wait_s, self._write)

    def _write(self) -> None:
        self._timer = None
        self._next_at = asyncio.get_running_loop().time() + LOG_INTERVAL_S
        counts, self._counts = self._counts, Counter()
        log.warning("connection.refused", **counts)


@dataclass(frozen=True, slots=True)
class ConnectionAdmission:
    """The connection pool of a listener's port, and the log of refused connections."""

    pool: Pool = field(default_factory=lambda: Pool(MAX_CONNECTIONS))
    notices: LimitedLog = field(default_factory=LimitedLog)


class Listener:
    """A listening socket that accepts connections from `start` to `close`.

    When a connection is made, the protocol that `factory` creates must set `ConnectionSlot.connection`, or abort the
    connection at once if the slot is already released. When the connection is lost, the protocol must release the slot.
    """

    def __init__(
        self,
        sock: socket.socket,
        factory: Factory,
        admission: ConnectionAdmission,
        tls: ssl.SSLContext | None = None,
        shutdown_s: float | None = None,
    ) -> None:
        """`shutdown_s`: time limit for sending the unsent bytes and for the TLS shutdown; None: asyncio's limit of 30
        s."""
        self._sock = sock
        self._factory = factory
        self._pool = admission.pool
        self._notices = admission.notices
        self._tls = tls
        self._shutdown_s = None if tls is None else shutdown_s
        self._loop = asyncio.get_running_loop()
        self._pending_tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Start or resume accepting."""
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop accepting, and drop the connections that are still being set up. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for task in self._pending_tasks:
            task.cancel()

    def _accept(self) -> None:
        self._pool.passes += 1
        for _ in range(ACCEPTS_A_PASS):
            if (wait_s := self._pool.wait_s(self._loop.time())) > 0:
                self._pause_accepting(wait_s)
                return
            try:
                connected, address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._notices.count("no_descriptor_left")
                    self._pause_accepting(PAUSE_S)
                    return
                continue  # the client closed the connection meanwhile
            self._admit(connected, str(address[0]) if isinstance(address, tuple) else "")

    def _pause_accepting(self, seconds: float) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(seconds, self.start)

    def _admit(self, connected: socket.socket, address: str) -> None:
        held, victim = self._pool.admit(address, self._loop.time())
        if victim is not None:
            self._notices.count("closed_for_others")
            if victim.connection is not None:
                victim.connection.evict()
        if held is None:
            self._notices.count("port_full")
            with suppress(OSError):
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connected.close()
            return
        connected.setblocking(False)
        beginning = _PendingConnection(self._loop, held)
        held.connection = beginning
        task = self._loop.create_task(self._begin(connected, held))
        beginning.task = task
        self._pending_tasks.add(task)
        task.add_done_callback(self._pending_tasks.discard)

    async def _begin(self, connected: socket.socket, held: ConnectionSlot) -> None:
        """Complete the TLS handshake, if the listener uses TLS, and pass the connection to a new protocol."""
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
        except OSError:  # the handshake failed, or the client is gone
            held.release()
        except BaseException:
            held.release()
            raise


class _PendingConnection:
    """A connection that is being set up and has no protocol object yet."""

    stage = ConnectionStage.SILENT
    requests = 0

    def __init__(self, loop: asyncio.AbstractEventLoop, held: ConnectionSlot) -> None:
        self.task: asyncio.Task[None] | None = None
        self._loop = loop
        self._held = held

    def evict(self, passes: int = 3) -> None:
        """Drop the connection after `passes` more passes of the event loop. If the connection's task were cancelled
        earlier, the socket would stay open."""
        if passes:
            self._loop.call_soon(self.evict, passes - 1)
        elif self.task is not None:
            self.task.cancel()
            if self._held.connection is not None and self._held.connection is not self:
                self._held.connection.evict()
