"""What one client of a Server may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may take. Seconds and bytes."""

    max_message_bytes: int = 16 << 20
    max_calls: int = 4096
    """Calls at once on one connection; a client's further ones wait on its side."""
    max_header_bytes: int = 65_536
    window_bytes: int = 1 << 20
    """Of one call's request that is not read yet; the connection's window is four times this, and 65,535 at least."""
    frame_bytes: int = 65_536
    hello_s: float = 20.0
    """A client that has not introduced itself by then is cut off."""
    request_s: float = 120.0
    """A call with one request must have sent it by then."""
    ping_s: float = 60.0
    ping_answer_s: float = 20.0
    resets_per_s: float = 1000.0
    resets_burst: float = 10_000.0
    """Resets, pings and settings of a client, as a token bucket: beyond it the connection ends (rapid reset)."""
    max_unsent_bytes: int = 64 << 20
    age_s: float = 0.0
    """Then the client is asked to open another connection; 0: never."""
    age_grace_s: float = 300.0
