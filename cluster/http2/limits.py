"""Limits for one client of a Server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_WINDOW_BYTES: Final = 65_535
"""Receive window in bytes that HTTP/2 prescribes until the server has sent another window size."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Limits for one client, in seconds and bytes."""

    max_message_bytes: int = 16 << 20
    max_calls: int = 4096
    """Maximum number of concurrent calls on one connection; the client delays further calls."""
    unauthenticated_calls: int = 100
    """Maximum number of concurrent calls on a connection without an admitted call; HTTP/2 recommends at least 100."""
    anonymous_calls: int = 8
    """Maximum number of concurrent calls on one connection to methods that need no credential."""
    max_header_bytes: int = 65_536
    header_bytes_per_s: float = 4 << 20
    header_bytes_burst: float = 16 << 20
    """Rate and size of a connection's token bucket for decoded header fields. Reading is delayed while the bucket is
    empty."""
    unauthenticated_header_bytes_per_s: float = 65_536
    unauthenticated_header_bytes_burst: float = 256 << 10
    window_bytes: int = FIRST_WINDOW_BYTES
    """Maximum number of unread request bytes of one call that no reservation covers."""
    connection_window_bytes: int = 1 << 20
    """Receive window in bytes that all calls of a connection share, after a call of the connection was admitted."""
    frame_bytes: int = 65_536
    hello_s: float = 20.0
    """Time limit for the client's preface and settings, and idle limit of a connection without an admitted call."""
    frame_s: float = 20.0
    """Time limit to complete a frame or header block."""
    idle_s: float = 300.0
    """Time without calls after which a connection gets a GOAWAY and is closed."""
    request_s: float = 120.0
    """Time limit to send the request of a call that takes one request message."""
    ping_s: float = 60.0
    ping_answer_s: float = 20.0
    resets_per_s: float = 1000.0
    resets_burst: float = 5000.0
    """Rate and size of a connection's token bucket for resets and refused calls. An empty frame costs a fifth of a
    reset. A connection whose bucket is empty is closed (rapid reset). A connection without an admitted call has a tenth
    of the rate and size."""
    max_unsent_bytes: int = 64 << 20
    age_s: float = 0.0
    """Age in seconds at which the server asks the client to reconnect; 0: never."""
    age_grace_s: float = 300.0
