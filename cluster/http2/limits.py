"""What one client of a Server may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FIRST_WINDOW_BYTES: Final = 65_535
"""What HTTP/2 lets a client send before it has heard of any window."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What one client may take. Seconds and bytes."""

    max_message_bytes: int = 16 << 20
    max_calls: int = 4096
    """Calls at once on one connection; a client's further ones wait on its side."""
    stranger_calls: int = 100
    """The same before a call of the connection was admitted; HTTP/2 asks for at least 100."""
    stranger_open_calls: int = 8
    """Of these, calls of methods that need no credential."""
    max_header_bytes: int = 65_536
    header_bytes_per_s: float = 4 << 20
    header_bytes_burst: float = 16 << 20
    """Header fields of all calls of a connection, decoded, a token bucket: beyond it the connection is read later."""
    stranger_header_bytes_per_s: float = 65_536
    stranger_header_bytes_burst: float = 256 << 10
    window_bytes: int = FIRST_WINDOW_BYTES
    """Of one call's request that is not read and has no reservation."""
    connection_window_bytes: int = 1 << 20
    """In transit of all calls of one connection, once one was admitted."""
    frame_bytes: int = 65_536
    hello_s: float = 20.0
    """A client that has not introduced itself by then is cut off; so is one that has never had a call admitted and has
    none under way for so long."""
    frame_s: float = 20.0
    """A frame or header block that has begun must be complete by then."""
    idle_s: float = 300.0
    """A connection without a call for so long is asked to go, and closed."""
    request_s: float = 120.0
    """A call with one request must have sent it by then."""
    ping_s: float = 60.0
    ping_answer_s: float = 20.0
    resets_per_s: float = 1000.0
    resets_burst: float = 5000.0
    """Resets and refused calls of a connection, as a token bucket: beyond it the connection ends (rapid reset). Other
    frames that carry nothing count a fifth. A connection without an admitted call has a tenth of both."""
    max_unsent_bytes: int = 64 << 20
    age_s: float = 0.0
    """Then the client is asked to open another connection; 0: never."""
    age_grace_s: float = 300.0
