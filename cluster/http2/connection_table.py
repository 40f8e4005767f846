"""Which connections a process keeps when it cannot keep all: caps for each port, admission, and the choice of victims.

Problem: each connection takes a descriptor. When none is left, nothing gets in: no probe, no worker, no operator, no
tenant. Clients may be few and idle, many, or all behind one address.
Method: the descriptors are divided among the ports in fixed shares, so that one port's clients never take another's. A
connection is a stranger until its client has shown a credential that was accepted (`prove`). When a port is full, a
newcomer takes the place of a stranger of the address with the most strangers: of its oldest ones, the one that has come
least far. So a client is not cut between its connection and its credential while others say nothing. When few strangers
are left, it takes the place of a connection that proved itself and rests. A connection with a call under way keeps its
place once it has proved itself. One address has at most a part of a port, and makes room among its own connections.
Invariants: a port's count never exceeds its cap, and an address's never the part. Every operation takes constant time:
resting connections are found by the clock algorithm, with a bounded number of looks.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from itertools import islice
from typing import Final, Protocol

OWN_DESCRIPTORS: Final = 96
"""Of a process for itself: files, database, limits store, helpers, logs, listeners, closing connections."""
MAX_CONNECTIONS: Final = 16_384
"""Of one process, where descriptors allow more: about a gigabyte."""
LEAST: Final = 8
"""Connections of each port, and of one address at a port, however few descriptors there are."""
PEER_PART: Final = 3, 4
"""One address has at most three quarters of a port: all clients may come from one ingress."""
STRANGER_PART: Final = 8
"""This part (an eighth) of a port is left for strangers, in which a client has the time to show a credential."""
YOUNG_S: Final = 0.2
"""On average a connection lasts so long, however fast others come: a full port accepts no faster than that allows, and
newcomers wait in the socket's queue."""
UNREAD_S: Final = 0.1
UNREAD_PASSES: Final = 10
"""A connection that is not older, in seconds and in passes of accepting, may not have been read yet."""
BURST_PART: Final = 4
"""At most a quarter of a port changes hands at once."""
LOOKS: Final = 16
"""Connections that are compared for one newcomer."""


class Port(Enum):
    """What a listener is for."""

    CLIENT = auto()
    """gRPC and HTTP together."""
    LINK = auto()
    ADMIN = auto()
    METRICS = auto()
    HEALTH = auto()


SHARES: Final = {Port.CLIENT: 16, Port.LINK: 6, Port.ADMIN: 4, Port.METRICS: 3, Port.HEALTH: 3}
"""Of the connections, in parts of their sum."""


class ConnectionStage(IntEnum):
    """How far a connection has come."""

    SILENT = 0
    """Nothing whole has been received; for TLS, before the end of the handshake."""
    GREETED = 1
    """The client speaks the protocol, and has no request under way."""
    CALLING = 2


class Managed(Protocol):
    """A connection as the table sees it."""

    @property
    def stage(self) -> ConnectionStage:
        """How far it has come."""

    @property
    def requests(self) -> int:
        """Requests that have begun, ever."""

    def shed(self) -> None:
        """End the connection: its place is another's."""


class Held:
    """The place of one connection. Its owner sets `connection` once there is one, and calls `release` at its end."""

    __slots__ = ("_pool", "_seen", "connection", "peer", "proven", "released", "since", "since_pass")

    def __init__(self, pool: Pool, peer: str, now: float) -> None:
        self.since = now
        self.since_pass = pool.passes
        self._pool = pool
        self._seen = 0
        self.peer = peer
        self.proven = False
        self.released = False
        """Whether the place is lost: a connection that still begins must end."""
        self.connection: Managed | None = None

    def prove(self) -> None:
        """The client has shown a credential that was accepted. Idempotent."""
        if not self.proven:
            self._pool.prove(self)

    def release(self) -> None:
        """The connection has ended. Idempotent."""
        self._pool.release(self)

    def stage(self, now: float) -> ConnectionStage:
        """How far the connection has come; a new one has yet to be read, and counts as one that has spoken."""
        stage = ConnectionStage.SILENT if self.connection is None else self.connection.stage
        old = now - self.since > UNREAD_S and self._pool.passes - self.since_pass > UNREAD_PASSES
        return stage if old else max(stage, ConnectionStage.GREETED)

    def used(self) -> bool:
        """Whether a call is under way or has begun since this was asked last."""
        connection = self.connection
        if connection is None:
            return False
        seen, self._seen = self._seen, connection.requests
        return connection.stage is ConnectionStage.CALLING or connection.requests != seen


@dataclass(slots=True)
class _Peer:
    """The connections of one address, in the order in which they came."""

    strangers: dict[Held, None]
    proven: dict[Held, None]

    def __len__(self) -> int:
        return len(self.strangers) + len(self.proven)


class Pool:
    """The connections of one port."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.passes = 0
        """Of accepting, counted by the listeners."""
        self.peer_cap = max(cap * PEER_PART[0] // PEER_PART[1], min(cap, LEAST))
        self._peers: dict[str, _Peer] = {}
        self._proven: dict[Held, None] = {}
        self._strangers = 0
        self._per_s = cap / YOUNG_S
        self._tokens = self._burst = max(cap / BURST_PART, 1.0)
        self._tokens_at = 0.0
        self._crowds: dict[int, dict[str, None]] = {}
        """Addresses by how many strangers they have."""
        self._largest = 0

    def __len__(self) -> int:
        return self._strangers + len(self._proven)

    def __repr__(self) -> str:
        return f"<Pool {len(self)} of {self.cap}, {self._strangers} strangers, {len(self._peers)} addresses>"

    def wait_s(self, now: float) -> float:
        """How long no newcomer is to be accepted, since too many have taken others' places."""
        self._tokens = min(self._tokens + (now - self._tokens_at) * self._per_s, self._burst)
        self._tokens_at = now
        return max(1.0 - self._tokens, 0.0) / self._per_s

    def admit(self, address: str, now: float) -> tuple[Held | None, Held | None]:
        """A place for a newcomer, None where it is to be refused; and the connection that must go, which has no place
        any more."""
        key = peer_of(address)
        peer = self._peers.get(key)
        victim = None
        if peer is not None and len(peer) >= self.peer_cap:
            victim = _least_far(peer.strangers, now) or self._resting(peer.proven)
            if victim is None:
                return None, None
        elif len(self) >= self.cap:
            victim = self._victim(now)
            if victim is None:
                return None, None
        if victim is not None:
            self._tokens -= 1
            self.release(victim)
        held = Held(self, key, now)
        self._add_stranger(held)
        return held, victim

    def prove(self, held: Held) -> None:
        """See Held.prove."""
        peer = self._peers.get(held.peer)
        if peer is None or held not in peer.strangers:
            return
        held.proven = True
        self._crowd(held.peer, len(peer.strangers), -1)
        del peer.strangers[held]
        peer.proven[held] = None
        self._proven[held] = None

    def release(self, held: Held) -> None:
        """See Held.release."""
        held.released = True
        peer = self._peers.get(held.peer)
        if peer is None:
            return
        if held in peer.strangers:
            self._crowd(held.peer, len(peer.strangers), -1)
            del peer.strangers[held]
        elif held in peer.proven:
            del peer.proven[held]
            del self._proven[held]
        if not len(peer):
            del self._peers[held.peer]

    def _victim(self, now: float) -> Held | None:
        if self._strangers <= self.cap // STRANGER_PART and (resting := self._resting(self._proven)) is not None:
            return resting
        if not self._strangers:
            return None
        crowded = next(iter(self._crowds[self._largest]))
        return _least_far(self._peers[crowded].strangers, now)

    def _resting(self, candidates: dict[Held, None]) -> Held | None:
        """One without a call, which has begun none since it was looked at last; those looked at go to the end."""
        for _ in range(min(LOOKS, len(candidates))):
            held = next(iter(candidates))
            if not held.used():
                return held
            del candidates[held]
            candidates[held] = None
        return None

    def _add_stranger(self, held: Held) -> None:
        peer = self._peers.setdefault(held.peer, _Peer({}, {}))
        self._crowd(held.peer, len(peer.strangers), 1)
        peer.strangers[held] = None

    def _crowd(self, key: str, before: int, change: int) -> None:
        """An address had so many strangers and has one more or less."""
        after = before + change
        self._strangers += change
        if after:
            self._crowds.setdefault(after, {})[key] = None
        self._largest = max(self._largest, after)
        if before:
            of_size = self._crowds[before]
            del of_size[key]
            if not of_size:
                del self._crowds[before]
                if self._largest == before:
                    self._largest = after


def _least_far(strangers: dict[Held, None], now: float) -> Held | None:
    """Of the oldest ones, the one that has come least far; the oldest of several."""
    return min(islice(strangers, LOOKS), key=lambda held: held.stage(now), default=None)


class ConnectionTable:
    """The pools of one process."""

    def __init__(self, caps: dict[Port, int]) -> None:
        self.pools = {port: Pool(cap) for port, cap in caps.items()}

    @classmethod
    def for_descriptors(cls, limit: int) -> ConnectionTable:
        """Of a process that may have `limit` descriptors."""
        spare = min(max(limit - OWN_DESCRIPTORS, 0), MAX_CONNECTIONS)
        return cls({port: max(spare * share // sum(SHARES.values()), LEAST) for port, share in SHARES.items()})


def peer_of(address: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 bits that one IPv6 subscriber is given."""
    if ":" not in address:
        return address
    try:
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False).network_address)
