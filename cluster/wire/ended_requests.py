"""What a worker remembers of ended requests until a gateway says that it is in the ledger's database.

Argument. A request is accepted with its record sealed inside; it runs, or it is here, until an acknowledgement names
it; an acknowledgement comes only after the database has committed. So losing any number of gateways with their disks
loses no record. Each record rests with one link at a time; when that ends, or does not acknowledge for long, another
gets it. Who gets a record twice writes the same row, so that offering too often costs nothing but work.

Bounded: beyond `max_records` the oldest go, counted (a database that is away for long; the gateways' spools have them
too). Pure: no clock, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MAX_RECORDS = 100_000
PATIENCE_S = 60.0
MOST_A_MESSAGE = 500


@dataclass(slots=True)
class EndedUsage:
    """Counts of one ended request; `sealed` is its open record, which only gateways can read. Times in seconds.

    `written_tokens` of the generated ones went to the link of the gateway that had sent the request;
    `earlier_tokens` of the same record came from other workers before. With `idle_id` it is idle time of the replica
    from `idle_since_s` (epoch) on, and belongs to no call.
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
    home: int
    slot: int
    link: int = 0
    sent_at: float | None = None


@dataclass(frozen=True, slots=True)
class KeeperStatistics:
    """Records that wait for an acknowledgement; how many were dropped for want of room."""

    kept: int
    dropped: int


class UsageKeeper:
    """Ended requests by key. Links are numbered from 1 and never used again; 0 is none."""

    def __init__(self, max_records: int = MAX_RECORDS, patience_s: float = PATIENCE_S) -> None:
        self._max_records = max_records
        self._patience_s = patience_s
        self._kept: dict[int, _Kept] = {}
        self._due: dict[int, deque[int]] = {}
        self._last_key = 0
        self._dropped = 0

    def statistics(self) -> KeeperStatistics:
        """A snapshot."""
        return KeeperStatistics(len(self._kept), self._dropped)

    def attach(self, link: int) -> None:
        """A link to a gateway that keeps accounts is up: it gets what no other link has."""
        self._due[link] = deque()
        self._place(kept for kept in self._kept.values() if not kept.link)

    def detach(self, link: int, unwritten: Mapping[int, int]) -> None:
        """A link has ended; `unwritten` tokens by slot never left. What it had not acknowledged goes to others."""
        self._due.pop(link, None)
        if unwritten:
            for kept in self._kept.values():
                if kept.home == link:
                    kept.usage.written_tokens -= min(unwritten.get(kept.slot, 0), kept.usage.written_tokens)
        orphans = [kept for kept in self._kept.values() if kept.link == link]
        for kept in orphans:
            kept.link = 0
        self._place(orphans)

    def keep(self, usage: EndedUsage, home: int, slot: int = 0) -> int:
        """A request of link `home` has ended; its key. Goes to that link if it is attached, else to any."""
        self._last_key += 1
        usage.key = self._last_key
        kept = self._kept[usage.key] = _Kept(usage, home, slot)
        self._place((kept,))
        if len(self._kept) > self._max_records:
            del self._kept[next(iter(self._kept))]
            self._dropped += 1
        return usage.key

    def due(self, link: int) -> bool:
        """Whether there is something to send."""
        return bool(self._due.get(link))

    def take(self, link: int, now: float, most: int = MOST_A_MESSAGE) -> list[EndedUsage]:
        """What is to be sent on this link now."""
        due, out = self._due.get(link), list[EndedUsage]()
        while due and len(out) < most:
            kept = self._kept.get(due.popleft())
            if kept is not None and kept.link == link:
                kept.sent_at = now
                out.append(kept.usage)
        return out

    def acked(self, keys: Iterable[int]) -> None:
        """These are in the database, whoever says so."""
        for key in keys:
            self._kept.pop(key, None)

    def hurry(self, now: float) -> list[int]:
        """Move what was sent long ago and not acknowledged to another link; the links that have got something."""
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

    def _place(self, some: Iterable[_Kept]) -> None:
        links = list(self._due)
        if not links:
            return
        for kept in some:
            kept.link = kept.home if kept.home in self._due else links[kept.usage.key % len(links)]
            kept.sent_at = None
            self._due[kept.link].append(kept.usage.key)
