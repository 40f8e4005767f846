"""Time limits of one connection, for a client that sends no preface, stalls, is idle or is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from h2.exceptions import H2Error

from cluster.http2.call import ServerCall
from cluster.http2.frame_intake import FrameIntake
from cluster.http2.h2_state import Http2State
from cluster.http2.limits import ServerLimits
from cluster.http2.messages import BadMessage

CHECKS: Final = 4
"""Number of checks of a connection within the connection's shortest time limit."""
CLOSE_S: Final = 5.0
"""Time in seconds after which a closed connection is aborted if the client reads nothing."""


class TimedConnection(Protocol):
    """The part of a connection that its timers use."""

    loop: asyncio.AbstractEventLoop
    limits: ServerLimits
    h2: Http2State
    transport: asyncio.Transport
    intake: FrameIntake
    calls: dict[int, ServerCall]
    closing: bool

    def send_h2_output(self) -> None:
        """Add the bytes that h2 has prepared to the send of this event-loop pass, after the bytes already queued."""

    def end_early(self, call: ServerCall, error: BadMessage) -> None:
        """End a call whose request is malformed, too large or too slow."""

    def leave(self, grace_s: float = 0.0) -> None:
        """Ask the client to reconnect. The connection closes after its last call, or at the latest after `grace_s`
        seconds."""

    def abort(self, reason: str) -> None:
        """Abort the connection and drop its unsent bytes."""


class ConnectionTimers:
    """The timers of one connection. `served`: whether a call was admitted. Until then the idle limit is shorter."""

    def __init__(self, connection: TimedConnection) -> None:
        self.served = False
        self.greeted = False
        self._connection = connection
        self._loop = connection.loop
        self._limits = connection.limits
        self._timers: list[asyncio.TimerHandle] = []
        self._answered = True
        self._idle_since = self._loop.time()

    def begin(self, age_s: float) -> None:
        """Start the timers. `age_s`: the connection's age limit, 0 for none."""
        limits = self._limits
        self.call_later(limits.hello_s, self._expect_hello)
        self.call_later(limits.ping_s, self._ping)
        self.call_later(self._check_interval_s, self._check)
        if age_s:
            self.call_later(age_s, self._reach_age_limit)

    def call_later(self, seconds: float, work: Callable[..., None], *arguments: object) -> None:
        """Call `work` after `seconds`, unless the connection is lost before then."""
        now = self._loop.time()
        self._timers = [t for t in self._timers if t.when() > now and not t.cancelled()]
        self._timers.append(self._loop.call_later(seconds, work, *arguments))

    def end(self) -> None:
        """Cancel all timers after the connection was lost."""
        for timer in self._timers:
            timer.cancel()

    def start_idle(self) -> None:
        """Start the idle time after the last admitted call has ended."""
        self._idle_since = self._loop.time()

    def answered(self) -> None:
        """Record the client's answer to a ping."""
        self._answered = True

    def closing(self) -> None:
        """Limit the time in which a closing connection sends its remaining bytes."""
        self.call_later(CLOSE_S, self._expect_closed, self._connection.transport.get_write_buffer_size())

    @property
    def _check_interval_s(self) -> float:
        limits = self._limits
        return min(limits.hello_s, limits.frame_s, limits.idle_s, limits.request_s) / CHECKS

    def _check(self) -> None:
        connection, limits, now = self._connection, self._limits, self._loop.time()
        if connection.intake.stalled_s(now) > limits.frame_s:
            connection.abort("a frame or header block was not complete in time")
            return
        if not connection.calls and now - self._idle_since > (limits.idle_s if self.served else limits.hello_s):
            connection.leave()
        for call in list(connection.calls.values()):
            if now - call.body.began_at > limits.request_s:
                connection.end_early(call, BadMessage("a message was not complete in time", too_large=True))
        self.call_later(self._check_interval_s, self._check)

    def _expect_hello(self) -> None:
        if not self.greeted:
            self._connection.transport.abort()

    def _ping(self) -> None:
        connection = self._connection
        if connection.closing:
            return
        self._answered = False
        with suppress(H2Error):
            connection.h2.ping(int(time.monotonic()).to_bytes(8, "big"))
        connection.send_h2_output()
        self.call_later(self._limits.ping_answer_s, self._expect_pong)

    def _expect_pong(self) -> None:
        if not self._answered:
            self._connection.abort("no answer to a ping")
            return
        self.call_later(self._limits.ping_s, self._ping)

    def _reach_age_limit(self) -> None:
        self._connection.leave(self._limits.age_grace_s)

    def _expect_closed(self, unsent_bytes: int) -> None:
        """Abort a closing connection unless the client has read bytes since the last check."""
        unsent = self._connection.transport.get_write_buffer_size()
        if unsent >= unsent_bytes:
            self._connection.transport.abort()
        else:
            self.call_later(CLOSE_S, self._expect_closed, unsent)
