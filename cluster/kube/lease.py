"""Of several who could act, one does: the rule by which a shared record (a Kubernetes Lease) is read and written.

Problem: two controllers that both act would undo each other's steps. Invariant: whoever acts has written the record
within `yield_s`, and nobody else takes it before it has stood unchanged for `lease_s` > `yield_s`. As in Kubernetes'
own leader election, others' clocks are not believed: a record is dead when *this* process has seen it unchanged for
long enough, so only the rates of clocks matter. The store refuses a write to a record that has changed since it was
read. So two act at once only if one is stopped between its look at the clock and its deed for longer than
`lease_s - yield_s`; what it then does meets Ray's own state, which the other has already compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Seconds. `lease_s`: how long an unchanged record keeps others away; `yield_s`: how long after its last write
    its holder still acts; `again_s`: between two looks."""

    lease_s: float = 15.0
    yield_s: float = 10.0
    again_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.again_s < self.yield_s < self.lease_s:
            raise ValueError(f"again ({self.again_s}) < yield ({self.yield_s}) < lease ({self.lease_s}) must hold")


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """What the store holds. `version` changes with every write, whoever writes; `transitions` counts holders."""

    holder: str
    version: str
    transitions: int = 0


@dataclass(frozen=True, slots=True)
class LeaseTake:
    """Write the record with this process as its holder; `over` is the one that was read, None to make the first."""

    over: LeaseRecord | None


@dataclass(frozen=True, slots=True)
class LeaseCandidate:
    """What one process remembers: the record as it last saw it and since when, and when it last wrote it."""

    me: str
    terms: LeaseTerms = LeaseTerms()
    seen: LeaseRecord | None = None
    seen_at_s: float = 0.0
    wrote_at_s: float | None = None

    def look(self, found: LeaseRecord | None, now_s: float) -> tuple[LeaseCandidate, LeaseTake | None]:
        """After a read that ended at `now_s`: what is known now, and whether to write."""
        if found is None:
            return replace(self, seen=None, wrote_at_s=None), LeaseTake(None)
        known = self if found == self.seen else replace(self, seen=found, seen_at_s=now_s)
        if found.holder == self.me:
            return known, LeaseTake(found)
        known = replace(known, wrote_at_s=None)
        if not found.holder or now_s - known.seen_at_s >= self.terms.lease_s:
            return known, LeaseTake(found)
        return known, None

    def written(self, record: LeaseRecord, began_at_s: float) -> LeaseCandidate:
        """After a write that the store took. It counts from before it was sent: nobody can have seen it earlier."""
        return replace(self, seen=record, seen_at_s=began_at_s, wrote_at_s=began_at_s)

    def acts(self, now_s: float) -> bool:
        """Whether this process may act."""
        return self.wrote_at_s is not None and now_s - self.wrote_at_s < self.terms.yield_s

    def acts_until_s(self) -> float:
        """When it has to stop, unless it writes before; in the past when it does not act."""
        return self.wrote_at_s + self.terms.yield_s if self.wrote_at_s is not None else float("-inf")
