"""Leader election by a shared record (a Kubernetes Lease): the rule by which processes read and write the record.

Problem: two controllers that both act would undo each other's steps. Invariant: a process that acts has written the
record within the last `yield_s` seconds. No other process takes the record before the record has stood unchanged for
`lease_s` seconds, where `lease_s` > `yield_s`. As in Kubernetes' own leader election, the clocks of other processes are
not trusted: a record has expired when *this* process has seen the record unchanged for long enough, so only the rates
of clocks matter. The store refuses a write to a record that has changed since it was read. So two processes act at once
only if one of them is paused for longer than `lease_s - yield_s` between checking the clock and acting. The action of
the paused process then applies to Ray's current state, which the other process has compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Times in seconds. `lease_s`: time for which an unchanged record keeps other processes away. `yield_s`: time after
    the last write for which the holder may act. `again_s`: interval of reads."""

    lease_s: float = 15.0
    yield_s: float = 10.0
    again_s: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.again_s < self.yield_s < self.lease_s:
            raise ValueError(f"again ({self.again_s}) < yield ({self.yield_s}) < lease ({self.lease_s}) must hold")


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The stored record. `version` changes with every write by any process. `transitions` is the number of changes of
    the holder."""

    holder: str
    version: str
    transitions: int = 0


@dataclass(frozen=True, slots=True)
class LeaseWrite:
    """A write that makes this process the holder. `over`: the record that was read; None to create a record."""

    over: LeaseRecord | None


@dataclass(frozen=True, slots=True)
class LeaseCandidate:
    """The state of one process: the last seen record, the time since which that record is unchanged, and the time of
    the process's own last write."""

    me: str
    terms: LeaseTerms = LeaseTerms()
    seen: LeaseRecord | None = None
    seen_at_s: float = 0.0
    wrote_at_s: float | None = None

    def observe(self, record: LeaseRecord | None, now_s: float) -> tuple[LeaseCandidate, LeaseWrite | None]:
        """Handle a read that ended at `now_s`. Returns the new state, and the write to make, if any."""
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
        """Handle a successful write and return the new state. The term starts before the request, because no other
        process saw the record earlier."""
        return replace(self, seen=record, seen_at_s=began_at_s, wrote_at_s=began_at_s)

    def may_act(self, now_s: float) -> bool:
        """Whether this process may act at `now_s`."""
        return self.wrote_at_s is not None and now_s - self.wrote_at_s < self.terms.yield_s

    def acts_until_s(self) -> float:
        """The time until which this process may act unless it renews the record; -inf if the process may not act."""
        return self.wrote_at_s + self.terms.yield_s if self.wrote_at_s is not None else float("-inf")
