"""Slots kept free for tenants that send little, while other tenants always have sequences waiting.

Problem: in a full cluster, each slot that becomes free is filled at once by a tenant that always has sequences waiting.
Even when its turn is next, a call of a quiet tenant must wait until a worker grants a free slot to the call's gateway.
If there are G gateways, each is granted only one in G of the free slots.

Invariants: slots are kept free only if a guest was seen in the last GUEST_S seconds. A guest is a tenant that has had
no more than its share and has no sequence waiting now. Slots are withheld only from tenants that have waited without a
pause for at least `idle_s` of FairOrder. At most one slot per KEPT_OF running calls of this gateway is kept, and at
most KEPT_MOST.

Source: trunk reservation (Kelly, Loss Networks, 1991): a few circuits that are kept for the rarer class cost the other
class little.
"""

from __future__ import annotations

KEPT_OF = 96
KEPT_MOST = 4
GUEST_S = 30.0


class ReservedSlots:
    """Reserved slots of one model. The caller notes guests once a second, and reads `reserved` at each turn."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def note_guest(self, rank: int, now: float) -> None:
        """Record that a guest of this class was seen: a tenant within its share that has no sequence waiting."""
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
