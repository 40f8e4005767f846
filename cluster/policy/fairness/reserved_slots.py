"""Places kept free for tenants who send little, beside those who always have something waiting.

Problem: at a full cluster each place that becomes free is taken at once by whoever always waits. So the call of a
quiet tenant, though the next turn is its own, waits for a place that is granted to its own gateway: of G gateways
that is each G-th. Invariants: places are kept only while a guest (a tenant who has had no more than its share and now
waits nowhere) was about of late; only from those who have waited without a pause for longer than an idle tenant is
remembered; never more than one in KEPT_OF of those that this gateway fills, nor more than KEPT_MOST.
Source: trunk reservation (Kelly, Loss Networks, 1991): a few circuits kept for the rarer class cost the other little.
"""

from __future__ import annotations

KEPT_OF = 96
KEPT_MOST = 4
GUEST_S = 30.0


class ReservedSlots:
    """Of one model. `seen` is told of guests once a second; `places` answers for each turn."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[int, float] = {}

    def seen(self, rank: int, now: float) -> None:
        """A guest of that class is about."""
        self._until[rank] = now + GUEST_S

    def places(self, rank: int, filled: int, now: float) -> int:
        """How many places stay free when one of the class `rank` takes its turn; `filled`: calls that run from here."""
        kept = min(filled // KEPT_OF, KEPT_MOST)
        if kept and any(now < until and guest <= rank for guest, until in self._until.items()):
            return kept
        return 0

    def __repr__(self) -> str:
        return f"Guests({len(self._until)} classes)"
