"""Leader election by a shared record (a Kubernetes Lease): the rules for reading and writing the record.

Problem: two controllers that act at the same time would undo each other's changes. Invariant: a process acts only
within `yield_s` seconds after its own last write of the record. Another process takes the record only if the record has
not changed for `lease_s` seconds, and `lease_s` is longer than `yield_s`. As in Kubernetes' own leader election, each
process measures the time without a change with its own clock, so only the rates of the clocks matter. The store refuses
a write if the record has changed since it was read. Two processes can act at the same time only if one of them pauses
for longer than `lease_s - yield_s` between checking its clock and acting.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """The times of a lease, in seconds. `lease_s`: another process may take the lease when its record has not changed
    for this time. `yield_s`: the holder may act for this time after its last write. `again_s`: time between two
    reads."""

    lease_s: float = 15.0
    yield_s: float = 10.0
    again_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.again_s < self.yield_s < self.lease_s:
            raise ValueError(f"again ({self.again_s}) < yield ({self.yield_s}) < lease ({self.lease_s}) must hold")


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The content of a Lease as stored. `holder`: name of the process that holds the Lease; "" for none. `version`:
    changes with every write by any process. `transitions`: how often the holder has changed."""

    holder: str
    version: str
    transitions: int = 0


@dataclass(frozen=True, slots=True)
class LeaseWrite:
    """A write that makes this process the holder. `over`: the record to replace; None to create a record."""

    over: LeaseRecord | None


@dataclass(frozen=True, slots=True)
class LeaseCandidate:
    """The state of one process that competes for the Lease.

    `me`: name of the process. `seen`: the Lease's record as last read. `seen_at_s`: when this process first
    read the record with this content. `wrote_at_s`: start of this process's last write; None while the process
    does not hold the Lease. Times are monotonic seconds.
    """

    me: str
    terms: LeaseTerms = LeaseTerms()
    seen: LeaseRecord | None = None
    seen_at_s: float = 0.0
    wrote_at_s: float | None = None

    def observe(self, record: LeaseRecord | None, now_s: float) -> tuple[LeaseCandidate, LeaseWrite | None]:
        """Return the state after a read, and the write that the caller must make, or None for no write. `record`: the
        record that was read, or None if the store has none."""
        if record is None:
            return replace(self, seen=None, wrote_at_s=None), LeaseWrite(None)
        known = self if record == self.seen else replace(self, seen=record, seen_at_s=now_s)
        if record.holder == self.me:
            return known, LeaseWrite(record)
        known = replace(known, wrote_at_s=None)
        if not record.holder or now_s - known.seen_at_s >= self.terms.lease_s:
            return known, LeaseWrite(record)
        return known, None

    def written(self, record: LeaseRecord, began_at_s: float) -> LeaseCandidate:
        """Return the state after a successful write of the Lease's record. `began_at_s`: start of the write.

        The process may act for `yield_s` seconds from the start of the write, not from its end. Other processes
        may have read the new record at any time after the start.
        """
        return replace(self, seen=record, seen_at_s=began_at_s, wrote_at_s=began_at_s)

    def may_act(self, now_s: float) -> bool:
        """Return whether this process may act at `now_s`."""
        return self.wrote_at_s is not None and now_s - self.wrote_at_s < self.terms.yield_s

    def acts_until_s(self) -> float:
        """The time when this process must stop acting, unless it renews the record before; -inf if it does not hold the
        Lease."""
        return self.wrote_at_s + self.terms.yield_s if self.wrote_at_s is not None else float("-inf")
