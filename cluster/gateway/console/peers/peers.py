"""Exchange of the console's data between the gateway processes of a cluster.

A process that shows the overview asks all others for their parts once a second; nothing is made or sent while no
process asks. If the configuration names a Valkey or Redis store, the processes ask through this store
(valkey_peers.py). Otherwise only the processes of one host ask each other (sibling_peers.py). A part holds only the
calls that ended in the last seconds. When a process begins to ask, it gets all remembered calls once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from cluster.gateway.console.overview.parts import FORMAT, MAX_CALLS, Part
from cluster.gateway.console.overview.rows import Row, check_row

EXPIRES_S: Final = 3.5
"""Seconds after which the last part of a process that no longer answers is left out."""
SHOWN_S: Final = 10.0
"""Seconds for which a call is in each part after the call has ended."""
FIRST_ANSWER_S: Final = 0.2
"""Seconds for which the first document of a console waits for the other processes."""
PIECE_ROWS: Final = 400
"""Number of rows that are encoded or decoded at once, which takes about two milliseconds."""
MAX_PIECE_BYTES: Final = 4 << 20
MAX_PEERS: Final = 256
MAX_ROWS: Final = 50_000
"""Maximum number of rows in each list of a part."""
PART_LISTS: Final = ("workers", "models", "tenants", "calls")

Columns = Mapping[str, Sequence[float | None]]
Question = Mapping[str, Any]
Answer = Callable[[Question], Awaitable[Mapping[str, Any] | None]]
"""Function that returns the answer to a question of another process; None for a question of an unknown kind."""


class Peers(Protocol):
    """Access to the other gateway processes of this host, or of all hosts, for the exchange of the console's data."""

    def start(self) -> None:
        """Begin to answer the requests of the other processes."""

    async def parts(self, now: float) -> Sequence[Part]:
        """Ask the other processes for their parts, and return the newest part of each that has arrived."""

    async def history(self, query: Question) -> Sequence[Columns]:
        """Return the other processes' columns for a query of the history."""

    async def close(self) -> None:
        """Stop requesting data from the other processes, and stop answering their requests."""


class NoPeers:
    """Implements Peers for a gateway process that is the only one."""

    def start(self) -> None:
        """Do nothing, since no other process sends requests."""

    async def parts(self, now: float) -> Sequence[Part]:
        """Return no parts, since there are no other processes."""
        return ()

    async def history(self, query: Question) -> Sequence[Columns]:
        """Return no columns, since there are no other processes."""
        return ()

    async def close(self) -> None:
        """Do nothing, since there is nothing to stop."""


NO_PEERS: Final = NoPeers()


@dataclass(slots=True)
class _Peer:
    part: Part
    at: float
    has_all: bool
    """Whether the process has sent all calls that it remembers."""
    ended: dict[str, Row] = field(default_factory=dict)
    """The ended calls of the process, the oldest first."""


class PeerParts:
    """The newest data (`Part`) that each other process has sent for the overview. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def put(self, part: Part, now: float) -> None:
        """Store a part. A part in another format is ignored. Raises ValueError for a malformed part, which would spoil
        the document of all."""
        if part.get("format") != FORMAT:
            return
        _check_part(part)
        name = part["gateway"]["id"]
        peer = self._peers.get(name)
        if peer is None:
            if len(self._peers) >= MAX_PEERS:
                return
            peer = self._peers[name] = _Peer(part, now, False)
        ended = {row["id"]: row for row in part["calls"] if row["state"] == "ended"}
        peer.part, peer.at, peer.has_all = part, now, peer.has_all or part["has_all"]
        peer.ended = ended if part["has_all"] else peer.ended | ended
        for oldest in list(peer.ended)[:-MAX_CALLS]:
            del peer.ended[oldest]

    def needs_all(self, now: float) -> bool:
        """Return whether a request must ask the other gateway processes for all calls that they remember. This is so if
        no such process is known, or if one of them has not sent all its calls yet."""
        self._forget(now)
        return not self._peers or any(not peer.has_all for peer in self._peers.values())

    def current(self, now: float) -> Sequence[Part]:
        """Return the newest `Part` of each other process, without parts that are older than EXPIRES_S. A part lists the
        open calls of the process that sent the part, and the ended calls of that process that are remembered here."""
        self._forget(now)
        return [
            peer.part
            | {"calls": [*(row for row in peer.part["calls"] if row["state"] != "ended"), *peer.ended.values()]}
            for peer in self._peers.values()
        ]

    def _forget(self, now: float) -> None:
        for name in [name for name, peer in self._peers.items() if now - peer.at > EXPIRES_S]:
            del self._peers[name]


def _check_part(part: Part) -> None:
    check_row("part", part)
    check_row("gateway", part["gateway"])
    for kind, thing, cause, since_s in part.get("problems", ()):
        if not all(isinstance(text, str) for text in (kind, thing, cause)) or not isinstance(since_s, int | float):
            raise ValueError("problems: must be texts with a time")
    for name in PART_LISTS:
        for row in part[name]:
            check_row(name, row)


def check_columns(columns: Any) -> Columns:
    """Return the columns of the history that another process has sent. Raises ValueError if they are malformed."""
    if not isinstance(columns, dict):
        raise ValueError("columns: must be an object")
    for name, values in columns.items():
        if not isinstance(values, list) or not all(each is None or isinstance(each, int | float) for each in values):
            raise ValueError(f"columns.{name[:64]}: must be a list of numbers")
    return columns


@dataclass(slots=True)
class _Unfinished:
    number: int
    part: Part
    left: int


class PartAssembler:
    """Assembler of parts of the console's overview, from the pieces in which they were sent. A part describes one
    gateway process. The pieces of one source must be added in the order in which they were sent."""

    def __init__(self) -> None:
        self._unfinished: dict[str, _Unfinished] = {}

    def add(self, source: str, number: int, piece: Mapping[str, Any]) -> Part | None:
        """Add a piece of a part from the gateway process `source`. Returns the whole part if `piece` is its last piece,
        else None. `number`: number of the part to which the piece belongs. A piece of an older part is dropped."""
        if "part" in piece:
            part = {name: [] for name in PART_LISTS} | piece["part"]
            if len(self._unfinished) >= MAX_PEERS:
                self._unfinished.clear()
            self._unfinished[source] = _Unfinished(number, part, int(piece["pieces"]))
        known = self._unfinished.get(source)
        if known is None or known.number != number:
            return None
        if "list" in piece:
            rows = known.part[piece["list"]]
            rows.extend(piece["rows"])
            if len(rows) > MAX_ROWS:
                del self._unfinished[source]
                raise ValueError(f"{piece['list'][:64]}: more than {MAX_ROWS} rows")
        known.left -= 1
        if known.left > 0:
            return None
        del self._unfinished[source]
        return known.part


def pieces_of(part: Part) -> Sequence[Mapping[str, Any]]:
    """Cut a part into pieces, which a PartAssembler joins again."""
    if sum(len(part[name]) for name in PART_LISTS) <= PIECE_ROWS:
        return [{"part": part, "pieces": 1}]
    rows = [
        {"list": name, "rows": part[name][at : at + PIECE_ROWS]}
        for name in PART_LISTS
        for at in range(0, len(part[name]), PIECE_ROWS)
    ]
    head = {name: value for name, value in part.items() if name not in PART_LISTS}
    return [{"part": head, "pieces": len(rows) + 1}, *rows]


class FirstConnected:
    """Access to the processes of all hosts while the Valkey or Redis store is reachable, else to the processes of this
    host. Implements Peers."""

    def __init__(self, of_all: Peers, is_connected: Callable[[], bool], of_host: Peers) -> None:
        self._of_all = of_all
        self._is_connected = is_connected
        self._of_host = of_host

    @property
    def _current(self) -> Peers:
        return self._of_all if self._is_connected() else self._of_host

    def start(self) -> None:
        """Begin to answer the requests that other gateway processes send for data. Implements Peers."""
        self._of_all.start()
        self._of_host.start()

    async def parts(self, now: float) -> Sequence[Part]:
        """Ask the other processes for their parts of the console's overview. Return the newest part of each process
        that has arrived."""
        return await self._current.parts(now)

    async def history(self, query: Question) -> Sequence[Columns]:
        """Return the other processes' columns for a query of the history. Implements Peers."""
        return await self._current.history(query)

    async def close(self) -> None:
        """Stop sending requests for data to the other gateway processes, and stop answering theirs. Implements
        Peers."""
        await self._of_all.close()
        await self._of_host.close()


def part_for_peers(part: Part, has_all: bool) -> Part:
    """Return a process's part of the overview in the form that is sent to other processes. With `has_all`, it holds all
    calls. Otherwise it holds the open calls, and the calls that ended in the last SHOWN_S."""
    since = part["at"] - SHOWN_S
    calls = part["calls"] if has_all else [row for row in part["calls"] if not _ended_before(row, since)]
    return part | {"calls": calls, "has_all": has_all}


def _ended_before(row: Row, since: float) -> bool:
    return bool(row["state"] == "ended" and row["arrived_s"] + row["duration_s"] < since)
