"""Budget for the bytes of request bodies that are received but not parsed yet. Bounds apply to each connection, to each
tenant and to the process.

Problem: a body can be parsed only when all bytes have arrived. Flow control bounds the bytes that one call has in
transit, but not the bytes of many unfinished bodies together: 40 bodies of 15 MiB hold 600 MiB. If each body were
granted a little at a time, the bodies could deadlock: every body could hold a part, and none could complete.

Method: only a small head start of a body is read before the whole size of the body is reserved. The server reads the
rest once the reservation is granted, and releases the reservation when the body is parsed or dropped. So each body with
a granted reservation can complete (the banker's algorithm, with whole claims).

Invariants: the sum of granted sizes never exceeds a bound, with one exception. A reservation that alone is larger than
the bound is granted when nothing else counts against that bound.

A reservation is granted as soon as the bounds allow the grant and no earlier reservation in the order waits for the
same bound. The order is: first the tenant that holds fewest bytes; within a tenant, the connection that holds fewest
bytes; within a connection, the reservation that has waited longest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

_K = TypeVar("_K")

GRACE_S = 5.0
"""Grace period in seconds after a grant, during which a body may arrive at any rate."""
MIN_BYTES_PER_S = 128 * 1024
"""Minimum mean rate in bytes per second. After the grace period, a slower body loses its reservation if other bodies
wait."""
MAX_WAITING = 128
"""Maximum number of waiting bodies of one tenant. All tenants together may have eight times as many."""


@dataclass(frozen=True, slots=True)
class ByteBounds:
    """Maximum numbers of bytes that are reserved at once, for a connection, a tenant and the process."""

    connection: int
    tenant: int
    process: int

    @classmethod
    def for_messages(cls, max_message_bytes: int) -> ByteBounds:
        """Return bounds for bodies of up to `max_message_bytes`: two such bodies for each tenant, sixteen for the
        process.

        The bounds are at least 32 MiB for a tenant and 256 MiB for the process.
        """
        tenant = max(2 * max_message_bytes, 32 << 20)
        return cls(connection=tenant, tenant=tenant, process=8 * tenant)


class Reservation:
    """Reservation of the bytes of one body. The reservation is waiting, granted or released."""

    __slots__ = (
        "_budget",
        "_granted_at",
        "_on_grant",
        "_received",
        "connection",
        "granted",
        "released",
        "size",
        "tenant",
        "too_slow",
    )

    def __init__(
        self,
        budget: RequestBytes,
        tenant: str,
        connection: Hashable,
        size: int,
        on_grant: Callable[[], None],
        too_slow: Callable[[], None],
    ) -> None:
        self.tenant = tenant
        self.connection = connection
        self.size = size
        self.granted = False
        self.released = False
        self.too_slow = too_slow
        """Function that ends the body and releases the reservation. Called by the caller of RequestBytes.slow, if the
        body is too slow."""
        self._budget = budget
        self._on_grant = on_grant
        self._granted_at = 0.0
        self._received = 0

    def __repr__(self) -> str:
        state = "released" if self.released else "granted" if self.granted else "waiting"
        return f"<Reservation {self.size} bytes of {self.tenant} {state}>"

    def received(self, size: int) -> None:
        """Add `size` to the number of bytes received since the grant. The minimum rate is checked against this
        number."""
        self._received += size

    def complete(self) -> None:
        """Mark the body as fully received.

        The minimum rate no longer applies, because the body only waits to be parsed.
        """
        self._received = max(self._received, self.size)

    def shrink(self, size: int) -> None:
        """Reduce the reservation to `size` bytes, because the body is smaller than reserved.

        The freed bytes may cause the grant of other reservations.
        """
        self._budget.shrink(self, size)

    def release(self) -> None:
        """Release the reserved bytes, or stop waiting for a grant. Idempotent.

        The freed bytes may cause the grant of other reservations.
        """
        self._budget.release(self)


class RequestBytes:
    """The budget of one process for bytes of request bodies: it grants and counts all reservations.

    Not safe for several threads. `clock` returns monotonic seconds.
    """

    def __init__(self, bounds: ByteBounds, clock: Callable[[], float]) -> None:
        self.bounds = bounds
        self._clock = clock
        self._held: Counter[str] = Counter()
        self._held_by_connection: Counter[Hashable] = Counter()
        self._total = 0
        self._granted: dict[Reservation, None] = {}
        self._waiting: dict[str, dict[Hashable, dict[Reservation, None]]] = {}

    def __repr__(self) -> str:
        return f"<RequestBytes {self._total} of {self.bounds.process} bytes, {self.waiting} reservations wait>"

    @property
    def held(self) -> int:
        """Number of bytes that are reserved now."""
        return self._total

    @property
    def waiting(self) -> int:
        """Number of waiting reservations."""
        return sum(len(queue) for queues in self._waiting.values() for queue in queues.values())

    def held_by(self, tenant: str) -> int:
        """Number of bytes that a tenant has reserved now."""
        return self._held[tenant]

    def full(self, tenant: str) -> bool:
        """Whether another body of the tenant must be refused because too many bodies wait.

        The number of waiting bodies is bounded because the first bytes of each waiting body are already in memory.
        """
        return sum(map(len, self._waiting.get(tenant, {}).values())) >= MAX_WAITING or self.waiting >= 8 * MAX_WAITING

    def reserve(
        self,
        tenant: str,
        connection: Hashable,
        size: int,
        on_grant: Callable[[], None],
        too_slow: Callable[[], None],
    ) -> Reservation:
        """Reserve the whole size of one body.

        The returned reservation is already granted if the bounds allow it now. Otherwise `on_grant` is called
        once, when other reservations have been released or reduced. `too_slow`: called if the body then arrives
        too slowly while other reservations wait.
        """
        reservation = Reservation(self, tenant, connection, size, on_grant, too_slow)
        if not self._waiting and self._fits(reservation):
            self._grant(reservation)
            return reservation
        self._waiting.setdefault(tenant, {}).setdefault(connection, {})[reservation] = None
        self._grant_all(reservation)
        return reservation

    def shrink(self, reservation: Reservation, size: int) -> None:
        """Implements `Reservation.shrink`."""
        less = reservation.size - size
        if less <= 0 or reservation.released:
            return
        reservation.size = size
        if reservation.granted:
            self._add(reservation, -less)
        self._grant_all()

    def release(self, reservation: Reservation) -> None:
        """Implements `Reservation.release`."""
        if reservation.released:
            return
        reservation.released = True
        if reservation.granted:
            del self._granted[reservation]
            self._add(reservation, -reservation.size)
        else:
            self._forget(reservation)
        self._grant_all()

    def slow(self) -> list[Reservation]:
        """Return the granted reservations whose bodies arrive too slowly; [] if no reservation waits.

        After GRACE_S seconds, a body must have received MIN_BYTES_PER_S bytes for each further second. The caller must
        call `too_slow` of each returned reservation.
        """
        if not self._waiting:
            return []
        now = self._clock()
        return [r for r in self._granted if r._received < min(r.size, _due(now - r._granted_at))]

    def _fits(self, reservation: Reservation) -> bool:
        size = reservation.size
        return (
            _within(self._total, size, self.bounds.process)
            and _within(self._held[reservation.tenant], size, self.bounds.tenant)
            and _within(self._held_by_connection[reservation.connection], size, self.bounds.connection)
        )

    def _grant_all(self, new: Reservation | None = None) -> None:
        """Grant all reservations that fit, in order. Calls on_grant for each, except for `new`.

        `new`: a reservation that is just being made. Its owner reads `granted` instead.
        """
        while (reservation := self._next()) is not None:
            self._forget(reservation)
            self._grant(reservation)
            if reservation is not new:
                reservation._on_grant()

    def _next(self) -> Reservation | None:
        """Return the waiting reservation to grant now, or None.

        If the next reservation fits its tenant's bound but not the bound of the whole process, None is returned: later
        reservations must not overtake it.
        """
        for tenant in sorted(self._waiting, key=self._held.__getitem__):
            first = self._first_of(tenant)
            if first is not None and _within(self._held[tenant], first.size, self.bounds.tenant):
                return first if _within(self._total, first.size, self.bounds.process) else None
        return None

    def _first_of(self, tenant: str) -> Reservation | None:
        """The tenant's first waiting reservation that fits the bound of its connection, or None."""
        held = self._held_by_connection
        for connection in sorted(self._waiting[tenant], key=held.__getitem__):
            first = next(iter(self._waiting[tenant][connection]))
            if _within(held[connection], first.size, self.bounds.connection):
                return first
        return None

    def _grant(self, reservation: Reservation) -> None:
        reservation.granted = True
        reservation._granted_at = self._clock()
        self._granted[reservation] = None
        self._add(reservation, reservation.size)

    def _forget(self, reservation: Reservation) -> None:
        queues = self._waiting[reservation.tenant]
        queue = queues[reservation.connection]
        del queue[reservation]
        if not queue:
            del queues[reservation.connection]
        if not queues:
            del self._waiting[reservation.tenant]

    def _add(self, reservation: Reservation, size: int) -> None:
        self._total += size
        _count(self._held, reservation.tenant, size)
        _count(self._held_by_connection, reservation.connection, size)


def _within(held: int, size: int, bound: int) -> bool:
    """Return whether `size` more bytes fit into the bound. While nothing is held, any size fits."""
    return held == 0 or held + size <= bound


def _count(counts: Counter[_K], key: _K, size: int) -> None:
    counts[key] += size
    if not counts[key]:
        del counts[key]


def _due(elapsed_s: float) -> float:
    """Number of bytes of a body that must have arrived `elapsed_s` seconds after its reservation was granted."""
    return (elapsed_s - GRACE_S) * MIN_BYTES_PER_S
