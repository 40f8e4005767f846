"""Time limits of one connection, for a client that sends no preface, stalls, does not read, is idle or is gone."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from h2.exceptions import H2Error

from cluster.http2.call import OpenStreams
from cluster.http2.frame_intake import FrameIntake
from cluster.http2.lifetime import ConnectionLifetime
from cluster.http2.limits import UNREAD_STEP
from cluster.http2.messages import BadMessage
from cluster.http2.output import ConnectionCore

CHECKS: Final = 4
"""Number of checks of a connection within the connection's shortest time limit."""


class ConnectionTimeouts:
    """The checks of one connection's time limits. The checks run from the start of the connection."""

    def __init__(
        self, core: ConnectionCore, lifetime: ConnectionLifetime, intake: FrameIntake, calls: OpenStreams, age_s: float
    ) -> None:
        """`age_s`: age limit of the connection in seconds, 0 for none."""
        self.greeted = False
        """Whether the client's settings have arrived. They directly follow the preface."""
        self._core = core
        self._limits = limits = core.limits
        self._lifetime = lifetime
        self._intake = intake
        self._calls = calls
        self._answered = True
        self._sent_bytes = 0
        """Value of `payload_bytes` at the last check."""
        self._check_s = min(limits.hello_s, limits.frame_s, limits.idle_s, limits.request_s, limits.unread_s) / CHECKS
        lifetime.call_later(limits.hello_s, self._expect_hello)
        lifetime.call_later(limits.ping_s, self._ping)
        lifetime.call_later(self._check_s, self._check)
        if age_s:
            lifetime.call_later(age_s, self._reach_age)

    def greet(self) -> None:
        """Record that the client's settings have arrived."""
        self.greeted = True

    def answered(self) -> None:
        """Record that the client has answered a ping."""
        self._answered = True

    def _check(self) -> None:
        limits, calls, now = self._limits, self._calls, self._core.loop.time()
        if self._intake.stalled_s(now) > limits.frame_s:
            self._lifetime.abort("a frame or header block was not complete in time")
            return
        running = list(calls.by_stream.values())
        if not running and now - calls.idle_since > (limits.idle_s if calls.served else limits.hello_s):
            self._lifetime.leave()
        for call in running:
            if now - call.request.body.began_at > limits.request_s:
                calls.end_early(call, BadMessage("a message was not complete in time", too_large=True))
            elif call.unread_s(now) > limits.unread_s:
                calls.end_unread(call)
        sent, sent_before = self._core.output.payload_bytes, self._sent_bytes
        self._sent_bytes = sent
        if sum(call.pending_bytes for call in running) > limits.max_unsent_bytes and sent - sent_before < UNREAD_STEP:
            self._lifetime.abort("the client does not read what it is sent")
            return
        self._lifetime.call_later(self._check_s, self._check)

    def _reach_age(self) -> None:
        self._lifetime.leave()
        self._lifetime.call_later(self._limits.age_grace_s, self._calls.end_open_requests)

    def _expect_hello(self) -> None:
        if not self.greeted:
            self._core.transport.abort()

    def _ping(self) -> None:
        output, h2 = self._core.output, self._core.h2
        if output.closed:
            return
        self._answered = False
        with suppress(H2Error):
            h2.ping(int(time.monotonic()).to_bytes(8, "big"))
        output.write_h2()
        self._lifetime.call_later(self._limits.ping_answer_s, self._expect_pong)

    def _expect_pong(self) -> None:
        if self._answered:
            self._lifetime.call_later(self._limits.ping_s, self._ping)
        else:
            self._lifetime.abort("no answer to a ping")
