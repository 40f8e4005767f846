"""Free ports of this machine, for listeners that a process started later will bind.

The kernel gives outgoing connections ports of its own range, also in the moment between the choice and the start of the
listener's process. So the ports below that range are tried first.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
PORTS, MIN_PORT, TRIES = 12_000, 10_000, 50
"""TRIES of the PORTS ports below the kernel's range are tried, unless they would reach down to MIN_PORT."""


def candidate_ports() -> Iterator[int]:
    """Yield ports to try in this order. The last is 0, with which the kernel chooses."""
    high = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        high = int(EPHEMERAL.read_text().split()[0])
    if high - PORTS > MIN_PORT:
        yield from (high - PORTS + secrets.randbelow(PORTS) for _ in range(TRIES))
    yield 0


def free_ports(count: int) -> list[int]:
    """Return `count` distinct TCP ports that are free now on all IPv4 addresses of this machine."""
    with contextlib.ExitStack() as held:
        return [_bind_any(held) for _ in range(count)]


def free_port() -> int:
    """Return a TCP port that is free now on all IPv4 addresses of this machine."""
    return free_ports(1)[0]


def _bind_any(held: contextlib.ExitStack) -> int:
    for port in candidate_ports():
        listener = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            listener.bind(("0.0.0.0", port))  # noqa: S104 - Ray's listeners are on all interfaces
            return int(listener.getsockname()[1])
    raise OSError("no port of this machine is free")
