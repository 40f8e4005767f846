"""Limits for one client of a Server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_WINDOW_BYTES: Final = 65_535
"""Bytes that HTTP/2 lets a client send before it has received a window size."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits for one client, in seconds and bytes."""

    max_message_bytes: int = 16 << 20
    max_calls: int = 4096
    """Concurrent calls on one connection; the client delays further ones."""
    unauthenticated_calls: int = 100
    """Concurrent calls before a call of the connection was admitted; HTTP/2 recommends at least 100."""
    anonymous_calls: int = 8
    """The part of these for methods that need no credential."""
    max_header_bytes: int = 65_536
    header_bytes_per_s: float = 4 << 20
    header_bytes_burst: float = 16 << 20
    """Token bucket for the decoded header fields of a connection's calls; beyond it, reading is delayed."""
    unauthenticated_header_bytes_per_s: float = 65_536
    unauthenticated_header_bytes_burst: float = 256 << 10
    window_bytes: int = FIRST_WINDOW_BYTES
    """Unread bytes of one call's request without a reservation."""
    connection_window_bytes: int = 1 << 20
    """Bytes in transit of all calls of one connection, once a call was admitted."""
    frame_bytes: int = 65_536
    hello_s: float = 20.0
    """Time for the client's preface and settings; also the idle limit before a call was admitted."""
    frame_s: float = 20.0
    """Time to complete a frame or header block."""
    idle_s: float = 300.0
    """A connection without calls for so long gets a GOAWAY and is closed."""
    request_s: float = 120.0
    """Time to send the request of a call with one request message."""
    ping_s: float = 60.0
    ping_answer_s: float = 20.0
    resets_per_s: float = 1000.0
    resets_burst: float = 5000.0
    """Token bucket for a connection's resets and refused calls; beyond it the connection is closed (rapid reset).
    Empty frames cost a fifth. A connection without an admitted call has a tenth of both."""
    max_unsent_bytes: int = 64 << 20
    age_s: float = 0.0
    """Age at which the client is asked to reconnect; 0: never."""
    age_grace_s: float = 300.0
