"""Slots kept free for tenants that send little, beside tenants that always have something waiting.

Problem: in a full cluster each slot that becomes free is filled at once by a tenant that always waits. The call of a
quiet tenant, although its turn is next, then waits for a slot that is granted to its own gateway: with G gateways that
is one slot in G.

Invariants: slots are kept only if a guest was seen recently (a tenant that has had no more than its share and now waits
nowhere). They are kept only from tenants that have waited without a pause for longer than an idle tenant is remembered.
The number kept is at most one in KEPT_OF of the running calls of this gateway, and at most KEPT_MOST.

Source: trunk reservation (Kelly, Loss Networks, 1991): a few circuits kept for the rarer class cost the other little.
"""

from __future__ import annotations

KEPT_OF = 96
KEPT_MOST = 4
GUEST_S = 30.0


class ReservedSlots:
    """Reserved slots of one model. Guests are noted once a second; `reserved` is read at each turn."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def note_guest(self, rank: int, now: float) -> None:
        """Note that a guest of this class was seen."""
        self._until[rank] = now + GUEST_S

    def reserved(self, rank: int, filled: int, now: float) -> int:
        """Slots to keep free when a sequence of class `rank` takes its turn. `filled`: this gateway's running calls."""
        kept = min(filled // KEPT_OF, KEPT_MOST)
        if kept and any(now < until and guest <= rank for guest, until in self._until.items()):
            return kept
        return 0

    def __repr__(self) -> str:
        return f"ReservedSlots({len(self._until)} classes)"
