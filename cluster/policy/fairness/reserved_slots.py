"""Slots kept free for tenants that send little, beside tenants that always have something waiting.

Problem: in a full cluster, each slot that becomes free is filled at once by a tenant that always waits. Even if a call
of a quiet tenant has the next turn, the call must wait for a slot that is granted to its own gateway. With G gateways
that is one slot in G.

Invariants: slots are kept free only if a guest was seen recently. A guest is a tenant that has had no more than its
share and now waits nowhere. Slots are kept only from tenants that have waited without a pause for longer than an idle
tenant is remembered. The number of kept slots is at most one in KEPT_OF of the running calls of this gateway, and at
most KEPT_MOST.

Source: trunk reservation (Kelly, Loss Networks, 1991): a few circuits that are kept for the rarer class cost the other
class little.
"""

from __future__ import annotations

KEPT_OF = 96
KEPT_MOST = 4
GUEST_S = 30.0


class ReservedSlots:
    """Reserved slots of one model. Guests are noted once a second. `reserved` is read at each turn."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def note_guest(self, rank: int, now: float) -> None:
        """Note that a guest of this class was seen."""
        self._until[rank] = now + GUEST_S

    def reserved(self, rank: int, filled: int, now: float) -> int:
        """Number of slots to keep free when a sequence of class `rank` takes its turn.

        `filled` is the number of running calls of this gateway.
        """
        kept = min(filled // KEPT_OF, KEPT_MOST)
        if kept and any(now < until and guest <= rank for guest, until in self._until.items()):
            return kept
        return 0

    def __repr__(self) -> str:
        return f"ReservedSlots({len(self._until)} classes)"
