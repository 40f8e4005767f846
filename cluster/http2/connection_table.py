"""Connection caps per port, admission at a full port, and the choice of the connection to close.

Problem: each connection takes a file descriptor. When no descriptor is left, no probe, worker, operator or tenant can
connect. A port may be filled by a few idle clients or by many clients, and all of them may share one address.

Method: each port gets a fixed share of the descriptors, so the clients of one port never take the descriptors of
another port. A connection is unauthenticated until its client presents an accepted credential (`mark_authenticated`).

A full port closes one connection for each new connection. The port first chooses the address that has the most
unauthenticated connections. Among the oldest connections of that address, it closes the connection at the earliest
stage (`ConnectionStage`). So a silent client loses its connection before a client that has spoken and not yet sent its
credential. When few unauthenticated connections are left, an idle authenticated connection is closed instead. An
authenticated connection with a call in progress is never closed; if no connection may be closed, the new connection is
refused.

One address may use only a part of a port. Beyond that part, a new connection of the address replaces another connection
of the same address.

Invariants: a port never exceeds its cap, and an address never exceeds its part of a port. Every operation takes
constant time: idle connections are found by the clock algorithm, with a bounded number of checks.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from itertools import islice
from typing import Final, Protocol

OWN_DESCRIPTORS: Final = 96
"""Descriptors for the process itself: files, database, limits store, helpers, logs, listeners."""
MAX_CONNECTIONS: Final = 16_384
"""Maximum number of connections of one process, about 1 GB of memory, even if the process may have more descriptors."""
MIN_CONNECTIONS: Final = 8
"""Minimum number of connections of each port, and of one address at a port, however few descriptors the process has."""
ADDRESS_PART: Final = 3, 4
"""Part of a port that one address may use: three quarters, because all clients may come from one ingress."""
UNAUTHENTICATED_PART: Final = 8
"""Divisor of a port's cap: an eighth is kept for clients that have not yet sent a credential."""
MEAN_LIFETIME_S: Final = 0.2
"""Minimum average lifetime of a connection at a full port, in seconds. It limits the rate at which new connections
replace others; further connections wait in the socket's queue."""
UNREAD_S: Final = 0.1
UNREAD_PASSES: Final = 10
"""UNREAD_S and UNREAD_PASSES: two ages of a connection, in seconds and in passes of accepting connections. Until a
connection is older than both, its received bytes may be unread."""
BURST_PART: Final = 4
"""Divisor of a port's cap: a quarter of the connections may be replaced at once."""
MAX_CHECKS: Final = 16
"""Maximum number of connections compared to find the connection to close."""


class Port(Enum):
    """The kind of connections that a listener accepts."""

    CLIENT = auto()
    """Connections of clients, by gRPC and HTTP together."""
    LINK = auto()
    ADMIN = auto()
    METRICS = auto()
    HEALTH = auto()


SHARES: Final = {Port.CLIENT: 16, Port.LINK: 6, Port.ADMIN: 4, Port.METRICS: 3, Port.HEALTH: 3}
"""The share of the connections that each port gets, relative to the sum of all shares."""


class ConnectionStage(IntEnum):
    """The progress of a connection. When a full port must close a connection, one at an earlier stage is closed
    first."""

    SILENT = 0
    """The client has sent nothing complete, or the TLS handshake is not complete."""
    GREETED = 1
    """The client speaks the protocol and has no request in progress."""
    CALLING = 2


class Managed(Protocol):
    """The part of a connection that the connection table uses."""

    @property
    def stage(self) -> ConnectionStage:
        """The connection's progress."""

    @property
    def requests(self) -> int:
        """A number that changes with every request that begins on the connection."""

    def evict(self) -> None:
        """Close the connection, because another connection takes its slot."""


class ConnectionSlot:
    """The slot of one connection in a pool. The slot's owner sets `connection` when the connection exists, and calls
    `release` when the connection ends."""

    __slots__ = ("_pool", "_seen", "authenticated", "connection", "peer", "released", "since", "since_pass")

    def __init__(self, pool: Pool, peer: str, now: float) -> None:
        self.since = now
        self.since_pass = pool.passes
        self._pool = pool
        self._seen = 0
        self.peer = peer
        self.authenticated = False
        self.released = False
        """Whether the slot was released. A connection that is still being set up must then be aborted."""
        self.connection: Managed | None = None

    def mark_authenticated(self) -> None:
        """Mark the client as authenticated. Idempotent."""
        if not self.authenticated:
            self._pool.mark_authenticated(self)

    def release(self) -> None:
        """Free the slot. Idempotent."""
        self._pool.release(self)

    def stage(self, now: float) -> ConnectionStage:
        """Return the connection's stage at the time `now`. A new connection counts at least as GREETED, because the
        bytes that its client has sent may still be unread."""
        stage = ConnectionStage.SILENT if self.connection is None else self.connection.stage
        old = now - self.since > UNREAD_S and self._pool.passes - self.since_pass > UNREAD_PASSES
        return stage if old else max(stage, ConnectionStage.GREETED)

    def used(self) -> bool:
        """Whether the client uses the connection: a request is in progress, or one has begun since this method was last
        called."""
        connection = self.connection
        if connection is None:
            return False
        seen, self._seen = self._seen, connection.requests
        return connection.stage is ConnectionStage.CALLING or connection.requests != seen


@dataclass(slots=True)
class _Peer:
    """The connections of one address, oldest first."""

    unauthenticated: dict[ConnectionSlot, None]
    proven: dict[ConnectionSlot, None]

    def __len__(self) -> int:
        return len(self.unauthenticated) + len(self.proven)


class Pool:
    """The connections of one port."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.passes = 0
        """Number of accept passes of the port's listeners."""
        self.peer_cap = max(cap * ADDRESS_PART[0] // ADDRESS_PART[1], min(cap, MIN_CONNECTIONS))
        self._peers: dict[str, _Peer] = {}
        self._authenticated: dict[ConnectionSlot, None] = {}
        self._unauthenticated = 0
        self._per_s = cap / MEAN_LIFETIME_S
        self._tokens = self._burst = max(cap / BURST_PART, 1.0)
        self._tokens_at = 0.0
        self._addresses_by_count: dict[int, dict[str, None]] = {}
        """Addresses by their number of unauthenticated connections."""
        self._largest = 0

    def __len__(self) -> int:
        return self._unauthenticated + len(self._authenticated)

    def __repr__(self) -> str:
        return (
            f"<Pool {len(self)} of {self.cap}, {self._unauthenticated} unauthenticated, {len(self._peers)} addresses>"
        )

    def wait_s(self, now: float) -> float:
        """Seconds until the next connection may be accepted. The pause is positive if the pool has closed many
        connections lately to make room for new connections."""
        self._tokens = min(self._tokens + (now - self._tokens_at) * self._per_s, self._burst)
        self._tokens_at = now
        return max(1.0 - self._tokens, 0.0) / self._per_s

    def admit(self, address: str, now: float) -> tuple[ConnectionSlot | None, ConnectionSlot | None]:
        """Return two slots: the slot of a new connection, and the slot of the connection that must be closed to make
        room for the new one.

        The first is None if the new connection must be refused. The second is None if no connection must be closed;
        otherwise it is already released.
        """
        key = peer_of(address)
        peer = self._peers.get(key)
        victim = None
        if peer is not None and len(peer) >= self.peer_cap:
            victim = _earliest_stage(peer.unauthenticated, now) or self._idle(peer.proven)
            if victim is None:
                return None, None
        elif len(self) >= self.cap:
            victim = self._victim(now)
            if victim is None:
                return None, None
        if victim is not None:
            self._tokens -= 1
            self.release(victim)
        held = ConnectionSlot(self, key, now)
        self._add_unauthenticated(held)
        return held, victim

    def mark_authenticated(self, held: ConnectionSlot) -> None:
        """Mark a connection's client as authenticated."""
        peer = self._peers.get(held.peer)
        if peer is None or held not in peer.unauthenticated:
            return
        held.authenticated = True
        self._count_unauthenticated(held.peer, len(peer.unauthenticated), -1)
        del peer.unauthenticated[held]
        peer.proven[held] = None
        self._authenticated[held] = None

    def release(self, held: ConnectionSlot) -> None:
        """Free a connection's slot."""
        held.released = True
        peer = self._peers.get(held.peer)
        if peer is None:
            return
        if held in peer.unauthenticated:
            self._count_unauthenticated(held.peer, len(peer.unauthenticated), -1)
            del peer.unauthenticated[held]
        elif held in peer.proven:
            del peer.proven[held]
            del self._authenticated[held]
        if not len(peer):
            del self._peers[held.peer]

    def _victim(self, now: float) -> ConnectionSlot | None:
        if (
            self._unauthenticated <= self.cap // UNAUTHENTICATED_PART
            and (idle := self._idle(self._authenticated)) is not None
        ):
            return idle
        if not self._unauthenticated:
            return None
        crowded = next(iter(self._addresses_by_count[self._largest]))
        return _earliest_stage(self._peers[crowded].unauthenticated, now)

    def _idle(self, candidates: dict[ConnectionSlot, None]) -> ConnectionSlot | None:
        """Return a connection that has no call in progress and has begun no call since the last check; None if none is
        found. Connections in use are moved to the end of `candidates`."""
        for _ in range(min(MAX_CHECKS, len(candidates))):
            held = next(iter(candidates))
            if not held.used():
                return held
            del candidates[held]
            candidates[held] = None
        return None

    def _add_unauthenticated(self, held: ConnectionSlot) -> None:
        peer = self._peers.setdefault(held.peer, _Peer({}, {}))
        self._count_unauthenticated(held.peer, len(peer.unauthenticated), 1)
        peer.unauthenticated[held] = None

    def _count_unauthenticated(self, key: str, before: int, change: int) -> None:
        """Record that the number of unauthenticated connections of the address `key` changes from `before` by `change`
        (1 or -1)."""
        after = before + change
        self._unauthenticated += change
        if after:
            self._addresses_by_count.setdefault(after, {})[key] = None
        self._largest = max(self._largest, after)
        if before:
            of_size = self._addresses_by_count[before]
            del of_size[key]
            if not of_size:
                del self._addresses_by_count[before]
                if self._largest == before:
                    self._largest = after


def _earliest_stage(unauthenticated: dict[ConnectionSlot, None], now: float) -> ConnectionSlot | None:
    """Return the unauthenticated connection that has made the least progress, such as one whose client has sent
    nothing. Only the first MAX_CHECKS connections of `unauthenticated`, which are the oldest, are compared. Of
    connections with equal progress, the oldest is returned."""
    return min(islice(unauthenticated, MAX_CHECKS), key=lambda held: held.stage(now), default=None)


class ConnectionTable:
    """The connection pools of one process, by port."""

    def __init__(self, caps: dict[Port, int]) -> None:
        self.pools = {port: Pool(cap) for port, cap in caps.items()}

    @classmethod
    def for_descriptors(cls, limit: int) -> ConnectionTable:
        """Create the table of a process that may open `limit` file descriptors."""
        spare = min(max(limit - OWN_DESCRIPTORS, 0), MAX_CONNECTIONS)
        return cls(
            {port: max(spare * share // sum(SHARES.values()), MIN_CONNECTIONS) for port, share in SHARES.items()}
        )


def peer_of(address: str) -> str:
    """Return the key under which an address's connections are counted: the IPv4 address, or the /64 prefix of an IPv6
    address, because one subscriber usually has a whole /64."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False).network_address)
