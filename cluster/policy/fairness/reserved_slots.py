"""Slots kept free for tenants that send little, while other tenants always have sequences waiting.

Problem: in a full cluster, each slot that becomes free is filled at once by a tenant that always has sequences waiting.
A call of a quiet tenant must then wait until a worker grants a free slot to the call's gateway, even when the call is
next. With G gateways, each gateway is granted only one in G of the free slots.

Method: a guest is a tenant that has had no more than its share and has no sequence waiting now. Slots are kept free if
a guest was seen in the last GUEST_S seconds.

Invariants: slots are withheld only from tenants that have waited without a pause for at least `idle_s` of FairOrder. At
most one slot per KEPT_OF running calls of this gateway is kept, and at most KEPT_MOST.

Source: trunk reservation (Kelly, Loss Networks, 1991): a few circuits that are kept for the rarer class cost the other
class little.
"""

from __future__ import annotations

KEPT_OF = 96
KEPT_MOST = 4
GUEST_S = 30.0


class ReservedSlots:
    """Slots of one model that are kept free for guests. A guest is a tenant that has had no more than its share and
    has no sequence waiting.

    The caller calls `note_guest` once a second for each priority class with a guest. Before each choice of a
    sequence, the caller asks `reserved` how many slots must stay free.
    """

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def note_guest(self, rank: int, now: float) -> None:
        """Record that the priority class `rank` has a guest at `now`. A guest is a tenant that has had no more than its
        share and has no sequence waiting."""
        self._until[rank] = now + GUEST_S

    def reserved(self, rank: int, filled: int, now: float) -> int:
        """Return how many slots must stay free for tenants that send little, if a sequence of class `rank` is sent
        next.

        `filled`: number of running calls of this gateway.
        """
        kept = min(filled // KEPT_OF, KEPT_MOST)
        if kept and any(now < until and guest <= rank for guest, until in self._until.items()):
            return kept
        return 0

    def __repr__(self) -> str:
        return f"ReservedSlots({len(self._until)} classes)"
