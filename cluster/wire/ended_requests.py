"""Usage records of ended requests, which a worker keeps until the records are in the ledger's database.

Guarantee: no record is lost, even if gateways are lost together with their disks. A request arrives at the worker with
its open record, which is encrypted. After the request has ended, the worker keeps its usage record until a gateway
acknowledges the record. Gateways acknowledge only after the database has committed. Each record is assigned to one link
at a time. If that link ends, or no acknowledgement arrives for a long time, the record is assigned to another link. A
record that is sent twice writes the same database row, so repetition does no harm.

Beyond `max_records` the oldest records are dropped and counted. This happens only if the database is down for a long
time, and then the gateways' spools also have the records. The classes are pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_RECORDS = 100_000
PATIENCE_S = 60.0
MAX_PER_MESSAGE = 500


@dataclass(slots=True)
class EndedUsage:
    """Usage of one ended request, with times in seconds. `sealed`: the open record, encrypted so that only gateways can
    read it.

    `written_tokens`: generated tokens that were sent to the request's gateway. `earlier_tokens`: tokens of the same
    record that other workers generated before. A record with an `idle_id` belongs to no call: it counts the replica's
    idle time since `idle_since_s` (seconds since the epoch).
    """

    sealed: bytes
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    written_tokens: int = 0
    earlier_tokens: int = 0
    gpu_seconds: float = 0.0
    gpu: str = ""
    outcome: str = ""
    duration_s: float = 0.0
    idle_id: str = ""
    idle_since_s: float = 0.0
    key: int = 0


@dataclass(slots=True)
class _Kept:
    usage: EndedUsage
    origin: int
    slot: int
    link: int = 0
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class KeeperStatistics:
    """The number of records that are kept, and the number of records that were dropped."""

    kept: int
    dropped: int


class UsageKeeper:
    """A worker's store of usage records of ended requests. It keeps each record, under a number, until a gateway has
    acknowledged it. Links are numbered from 1, and a link's number is never reused; 0 means no link."""

    def __init__(self, max_records: int = MAX_RECORDS, patience_s: float = PATIENCE_S) -> None:
        self._max_records = max_records
        self._patience_s = patience_s
        self._kept: dict[int, _Kept] = {}
        self._due: dict[int, deque[int]] = {}
        self._last_key = 0
        self._dropped = 0

    def statistics(self) -> KeeperStatistics:
        """Return the current numbers of kept and dropped records."""
        return KeeperStatistics(len(self._kept), self._dropped)

    def attach(self, link: int) -> None:
        """Add a link to a gateway that writes to the ledger. Records that have no link yet are assigned to this
        link."""
        self._due[link] = deque()
        self._assign(kept for kept in self._kept.values() if not kept.link)

    def detach(self, link: int, unwritten: Mapping[int, int]) -> None:
        """Remove a link, and assign its records to other links. `unwritten`: by slot, the number of tokens that were
        never sent on the link; they are subtracted from `written_tokens`."""
        self._due.pop(link, None)
        if unwritten:
            for kept in self._kept.values():
                if kept.origin == link:
                    kept.usage.written_tokens -= min(unwritten.get(kept.slot, 0), kept.usage.written_tokens)
        unassigned = [kept for kept in self._kept.values() if kept.link == link]
        for kept in unassigned:
            kept.link = 0
        self._assign(unassigned)

    def keep(self, usage: EndedUsage, origin: int, slot: int = 0) -> int:
        """Keep the usage of an ended request, and return its new key. The record is assigned to the link `origin` if
        that link is attached, otherwise to any attached link. If no link is attached, the record waits for the next
        `attach`."""
        self._last_key += 1
        usage.key = self._last_key
        kept = self._kept[usage.key] = _Kept(usage, origin, slot)
        self._assign((kept,))
        if len(self._kept) > self._max_records:
            del self._kept[next(iter(self._kept))]
            self._dropped += 1
        return usage.key

    def has_due(self, link: int) -> bool:
        """Whether records wait to be sent on this link."""
        return bool(self._due.get(link))

    def pop_due(self, link: int, now: float, most: int = MAX_PER_MESSAGE) -> list[EndedUsage]:
        """Return the next records to send on this link, at most `most`, and mark them as sent. Each record is kept
        until it is acknowledged."""
        due, out = self._due.get(link), list[EndedUsage]()
        while due and len(out) < most:
            kept = self._kept.get(due.popleft())
            if kept is not None and kept.link == link:
                kept.sent_at = now
                out.append(kept.usage)
        return out

    def acknowledge(self, keys: Iterable[int]) -> None:
        """Drop records, because they are in the database. A record may be acknowledged on any link."""
        for key in keys:
            self._kept.pop(key, None)

    def reassign_late(self, now: float) -> list[int]:
        """Assign each record whose acknowledgement is overdue to another link. Returns the links that got records."""
        if len(self._due) < 2:
            return []
        late = []
        for kept in self._kept.values():
            if kept.sent_at is not None and now - kept.sent_at > self._patience_s:
                late.append(kept)
        links = set()
        for kept in late:
            others = [link for link in self._due if link != kept.link]
            kept.link, kept.sent_at = others[kept.usage.key % len(others)], None
            self._due[kept.link].append(kept.usage.key)
            links.add(kept.link)
        return sorted(links)

    def _assign(self, records: Iterable[_Kept]) -> None:
        links = list(self._due)
        if not links:
            return
        for kept in records:
            kept.link = kept.origin if kept.origin in self._due else links[kept.usage.key % len(links)]
            kept.sent_at = None
            self._due[kept.link].append(kept.usage.key)
