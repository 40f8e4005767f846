"""Credit: how a worker shares its room between gateways, so that work leaves a gateway only for room that exists.

Problem: each of G gateways would like to fill the same free place. Invariant: the room that a worker has promised to
all its links together never exceeds its room. A promise is a limit on what a link may ever send (QUIC's MAX_STREAMS,
RFC 9000 section 4.6), so that a lost or repeated message changes nothing. A limit can be lowered, to give unused room
to a link with more waiting; the room counts as promised until the gateway has acknowledged the lower limit.

Both objects are pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker can take now beyond what it has: sequences, and prompt tokens that fit its KV cache."""

    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A link's new limits over its whole life: number of Submits and sum of their prompt tokens."""

    link: int
    grant_id: int
    sequences: int
    tokens: int


@dataclass(slots=True)
class _Account:
    spent: Capacity = Capacity(0, 0)
    limit: Capacity = Capacity(0, 0)
    waiting: int = 0
    kept: int = 0
    grant_id: int = 0
    unacked: list[tuple[int, Capacity]] = field(default_factory=list)

    def promised(self) -> Capacity:
        """Room this link may still claim: the largest limit that may be in force at the gateway, less what it spent."""
        sequences, tokens = self.limit.sequences, self.limit.tokens
        for _, older in self.unacked:
            sequences, tokens = max(sequences, older.sequences), max(tokens, older.tokens)
        return Capacity(max(sequences - self.spent.sequences, 0), max(tokens - self.spent.tokens, 0))


class CreditGranter:
    """The worker's side: splits room by the backlog that links report, evenly where none does."""

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}

    def attach(self, link: int) -> None:
        """A new link; it has sent nothing."""
        self._accounts[link] = _Account()

    def detach(self, link: int) -> None:
        """A link that ended; its promises end with it."""
        self._accounts.pop(link, None)

    def spent(self, link: int, tokens: int, kept: bool = False) -> None:
        """A Submit with that many prompt tokens has arrived, of a call whose KV blocks were `kept` here or not."""
        account = self._accounts[link]
        account.kept = max(account.kept - kept, 0)
        account.spent = Capacity(account.spent.sequences + 1, account.spent.tokens + tokens)

    def backlog(self, link: int, waiting: int, kept: int = 0) -> None:
        """A gateway says how many of its calls wait for this worker's model, and of how many of them the KV blocks are
        here."""
        account = self._accounts[link]
        account.kept = min(kept, waiting)
        account.waiting = waiting - account.kept

    def acked(self, link: int, grant_id: int) -> None:
        """A gateway has applied that grant: older limits are no longer in force."""
        account = self._accounts[link]
        account.unacked = [(i, older) for i, older in account.unacked if i >= grant_id]

    def promised(self) -> Capacity:
        """Room promised to all links together."""
        rooms = [account.promised() for account in self._accounts.values()]
        return Capacity(sum(r.sequences for r in rooms), sum(r.tokens for r in rooms))

    def grants(self, room: Capacity, places: int = 0) -> list[Grant]:
        """The limits to send now, for links whose limit changes. `room` is what is free, promised or not. `places`: as
        many sequences where they cost next to nothing to begin, for calls whose KV blocks are here."""
        if not self._accounts:
            return []
        kept = {link: account.kept for link, account in self._accounts.items()}
        waiting = {link: account.waiting for link, account in self._accounts.items()}
        whole = {link: kept[link] + waiting[link] for link in kept}
        more = min(sum(kept.values()), max(places - max(room.sequences, 0), 0))
        room = Capacity(max(room.sequences, 0) + more, max(room.tokens, 0))
        of_kept = _shares(more, kept)
        rest = {link: waiting[link] + kept[link] - of_kept[link] for link in kept}
        share = {link: of_kept[link] + part for link, part in _shares(room.sequences - more, rest).items()}
        token_share = _shares(room.tokens, whole)
        promised = self.promised()
        spare = Capacity(max(room.sequences - promised.sequences, 0), max(room.tokens - promised.tokens, 0))
        out = []
        # Those who give come first: their room is free only after their acknowledgement, yet the order keeps it plain.
        for link, account in sorted(self._accounts.items()):
            held = account.promised()
            sequences = min(share[link], held.sequences + spare.sequences)
            tokens = min(token_share[link], held.tokens + spare.tokens)
            spare = Capacity(
                spare.sequences - max(sequences - held.sequences, 0), spare.tokens - max(tokens - held.tokens, 0)
            )
            limit = Capacity(account.spent.sequences + sequences, account.spent.tokens + tokens)
            if not _worth_telling(account.limit, limit, room.tokens):
                continue
            account.grant_id += 1
            account.unacked.append((account.grant_id - 1, account.limit))
            account.limit = limit
            out.append(Grant(link, account.grant_id, limit.sequences, limit.tokens))
        return out


def _shares(total: int, claims: Mapping[int, int]) -> dict[int, int]:
    """Split `total` by claims (largest remainder); evenly when nobody has one."""
    weights = claims if any(claims.values()) else dict.fromkeys(claims, 1)
    whole = sum(weights.values())
    shares = {link: total * weight // whole for link, weight in weights.items()}
    rest = total - sum(shares.values())
    for link in _by_remainder(weights, total, whole)[:rest]:
        shares[link] += 1
    return shares


def _by_remainder(weights: Mapping[int, int], total: int, whole: int) -> list[int]:
    return sorted((k for k, w in weights.items() if w), key=lambda k: (-(total * weights[k] % whole), k))


def _worth_telling(old: Capacity, new: Capacity, room_tokens: int) -> bool:
    """Every change of sequences; of tokens only when it is a tenth of the room, since each decoded token moves it."""
    if old.sequences != new.sequences:
        return True
    return abs(old.tokens - new.tokens) * 10 > max(room_tokens, 1)


class CreditBalance:
    """The gateway's side of one link: what may still be sent."""

    def __init__(self) -> None:
        self._sent = Capacity(0, 0)
        self._limit = Capacity(0, 0)
        self.grant_id = 0

    @property
    def free(self) -> Capacity:
        """Room that may be used now; never negative."""
        return Capacity(
            max(self._limit.sequences - self._sent.sequences, 0), max(self._limit.tokens - self._sent.tokens, 0)
        )

    def granted(self, grant_id: int, sequences: int, tokens: int) -> None:
        """Apply a Credit; an older one than the last is ignored."""
        if grant_id > self.grant_id:
            self.grant_id = grant_id
            self._limit = Capacity(sequences, tokens)

    def spend(self, tokens: int) -> None:
        """A Submit with that many prompt tokens goes out. The caller has looked at `free`."""
        self._sent = Capacity(self._sent.sequences + 1, self._sent.tokens + tokens)
