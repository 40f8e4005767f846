"""Credit: a worker divides its capacity among the gateways, and a gateway sends a request only if it has credit.

Problem: without credit, several gateways would send requests for the same free capacity. Invariant: the capacity
promised to all links together never exceeds the worker's capacity.

Capacity is promised as a limit on the total that a link may ever send (as in QUIC's MAX_STREAMS, RFC 9000 section 4.6).
So a lost or repeated message does no harm. A worker can lower a limit, to move unused capacity to a link with a longer
queue. Until the gateway has acknowledged the lower limit, the worker counts the higher limit as promised.

CreditGranter and CreditBalance are pure: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.api.frozen import frozen_dataclass


@frozen_dataclass
class Capacity:
    """An amount of a worker's capacity: a number of sequences, and a number of prompt tokens in the KV cache."""

    sequences: int
    tokens: int


NOTHING = Capacity(0, 0)


@frozen_dataclass
class Grant:
    """New limits of a link: the number of Submits (requests), and the sum of their prompt tokens. Both count from the
    start of the link."""

    link: int
    grant_id: int
    sequences: int
    tokens: int


@dataclass(slots=True)
class _Account:
    spent: Capacity = NOTHING
    limit: Capacity = NOTHING
    waiting: int = 0
    kept: int = 0
    grant_id: int = 0
    unacked: list[tuple[int, Capacity]] = field(default_factory=list)

    def promised(self) -> Capacity:
        """Return the capacity that this link may still use: the highest limit that the gateway may know, minus the
        capacity that the link has already used."""
        sequences, tokens = self.limit.sequences, self.limit.tokens
        for _, older in self.unacked:
            sequences, tokens = max(sequences, older.sequences), max(tokens, older.tokens)
        return Capacity(max(sequences - self.spent.sequences, 0), max(tokens - self.spent.tokens, 0))


class CreditGranter:
    """Divides a worker's free capacity among its links to gateways, as credit: the capacity that a gateway may use.

    Each link gets a share in proportion to its gateway's backlog. If all backlogs are empty, the shares are equal.
    """

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}

    def attach(self, link: int) -> None:
        """Add a new link, on which no request was received yet."""
        self._accounts[link] = _Account()

    def detach(self, link: int) -> None:
        """Remove a link that has ended. The capacity that was promised to it becomes free."""
        self._accounts.pop(link, None)

    def record_submit(self, link: int, tokens: int, kept: bool = False) -> None:
        """Count a received request (Submit) with `tokens` prompt tokens. `kept`: whether this worker holds the KV
        blocks of the request."""
        account = self._accounts[link]
        account.kept = max(account.kept - kept, 0)
        account.spent = Capacity(account.spent.sequences + 1, account.spent.tokens + tokens)

    def set_backlog(self, link: int, waiting: int, kept: int = 0) -> None:
        """Set the number of calls that wait at the gateway of a link. `kept`: how many of these calls have their KV
        blocks on this worker."""
        account = self._accounts[link]
        account.kept = min(kept, waiting)
        account.waiting = waiting - account.kept

    def acknowledge(self, link: int, grant_id: int) -> None:
        """Record that the gateway has applied the grant `grant_id`. The limits of older grants no longer count as
        promised."""
        account = self._accounts[link]
        account.unacked = [(i, older) for i, older in account.unacked if i >= grant_id]

    def promised(self) -> Capacity:
        """Return the capacity promised to all links together."""
        rooms = [account.promised() for account in self._accounts.values()]
        return Capacity(sum(r.sequences for r in rooms), sum(r.tokens for r in rooms))

    def new_grants(self, room: Capacity, places: int = 0) -> list[Grant]:
        """Return the new limits to send, for the links whose limits change.

        `room`: free capacity, including capacity that is already promised. `places`: upper limit on the promised
        sequences. If `places` exceeds the sequences of `room`, the additional sequences are only for calls whose KV
        blocks this worker holds, because such calls start at almost no cost.
        """
        if not self._accounts:
            return []
        begins, room_tokens = max(room.sequences, 0), max(room.tokens, 0)
        extra = min(sum([account.kept for account in self._accounts.values()]), max(places - begins, 0))
        share, token_share = self._divided(begins, extra, room_tokens)
        promised = [(link, account, account.promised()) for link, account in sorted(self._accounts.items())]
        spare = max(begins + extra - sum([held.sequences for _, _, held in promised]), 0)
        spare_tokens = max(room_tokens - sum([held.tokens for _, _, held in promised]), 0)
        out = []
        # Capacity taken from a link becomes spare only after the acknowledgement, so the order of links is irrelevant.
        for link, account, held in promised:
            sequences = min(share[link], held.sequences + spare)
            tokens = min(token_share[link], held.tokens + spare_tokens)
            spare -= max(sequences - held.sequences, 0)
            spare_tokens -= max(tokens - held.tokens, 0)
            limit = Capacity(account.spent.sequences + sequences, account.spent.tokens + tokens)
            if not _worth_sending(account.limit, limit, room_tokens):
                continue
            account.grant_id += 1
            account.unacked.append((account.grant_id - 1, account.limit))
            account.limit = limit
            out.append(Grant(link, account.grant_id, limit.sequences, limit.tokens))
        return out

    def _divided(self, begins: int, extra: int, tokens: int) -> tuple[Mapping[int, int], Mapping[int, int]]:
        """Divide free capacity among the links. Returns the number of sequences by link, and the number of tokens by
        link. `begins`: sequences for any call. `extra`: sequences only for calls whose KV blocks this worker holds."""
        accounts = self._accounts
        if len(accounts) == 1:  # most workers have one gateway
            return dict.fromkeys(accounts, begins + extra), dict.fromkeys(accounts, tokens)
        kept = {link: account.kept for link, account in accounts.items()}
        claims = {link: account.kept + account.waiting for link, account in accounts.items()}
        extra_shares = _shares(extra, kept)
        others = {link: claims[link] - extra_shares[link] for link in claims}
        shares = {link: extra_shares[link] + part for link, part in _shares(begins, others).items()}
        return shares, _shares(tokens, claims)


def _shares(total: int, claims: Mapping[int, int]) -> dict[int, int]:
    """Split `total` in proportion to `claims`, by the largest-remainder method. If all claims are zero, split it
    evenly."""
    weights = claims if any(claims.values()) else dict.fromkeys(claims, 1)
    weight_sum = sum(weights.values())
    shares = {link: total * weight // weight_sum for link, weight in weights.items()}
    rest = total - sum(shares.values())
    for link in _by_remainder(weights, total, weight_sum)[:rest]:
        shares[link] += 1
    return shares


def _by_remainder(weights: Mapping[int, int], total: int, weight_sum: int) -> list[int]:
    return sorted((k for k, w in weights.items() if w), key=lambda k: (-(total * weights[k] % weight_sum), k))


def _worth_sending(old: Capacity, new: Capacity, room_tokens: int) -> bool:
    """Return whether a changed limit must be sent. A changed number of sequences is always sent. If only the number of
    tokens has changed, the change must exceed a tenth of `room_tokens`, because every decoded token changes this number
    a little."""
    if old.sequences != new.sequences:
        return True
    return abs(old.tokens - new.tokens) * 10 > max(room_tokens, 1)


class CreditBalance:
    """The gateway's side of the credit of one link: the capacity that the gateway may still use."""

    def __init__(self) -> None:
        self._sent = Capacity(0, 0)
        self._limit = Capacity(0, 0)
        self.grant_id = 0

    @property
    def free(self) -> Capacity:
        """The capacity that the gateway may use now; never negative."""
        return Capacity(
            max(self._limit.sequences - self._sent.sequences, 0), max(self._limit.tokens - self._sent.tokens, 0)
        )

    def apply_credit(self, grant_id: int, sequences: int, tokens: int) -> None:
        """Apply a Credit message. A message older than the last applied message is ignored."""
        if grant_id > self.grant_id:
            self.grant_id = grant_id
            self._limit = Capacity(sequences, tokens)

    def spend(self, tokens: int) -> None:
        """Count a sent request (Submit) with `tokens` prompt tokens. The caller must have checked `free`."""
        self._sent = Capacity(self._sent.sequences + 1, self._sent.tokens + tokens)
