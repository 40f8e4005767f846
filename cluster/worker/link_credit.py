"""The credit of a worker's links: free capacity that the worker grants to gateways, and the gateways'
acknowledgements.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from cluster.api.types import DrainState
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.credit import Capacity, CreditGranter
from cluster.wire.outbox import Outbox
from cluster.worker.drain_state import DrainStates


def credit_order(worker_id: str, gateway: str, link: int) -> int:
    """Return the sort key of a link among the links that share a worker's capacity. The order differs between workers.

    Reason: assume that no call waits and each worker has fewer free slots than there are gateways. With the same order
    on all workers, the last gateway would get no credit from any worker.
    """
    return zlib.crc32(f"{worker_id}/{gateway}".encode()) << 32 | link


@dataclass(slots=True)
class _Acknowledgement:
    outbox: Outbox
    grant_id: int = 0
    since: float | None = None
    """Monotonic time since which a grant has been unacknowledged; None if all grants are acknowledged."""


class LinkCredit:
    """The credit of all links. Credit is granted only while the worker takes new sequences. The methods identify a link
    by the number that `credit_order` has returned for it."""

    def __init__(
        self, capacity: Callable[[], tuple[Capacity, int]], count_cached: Callable[[int], int], drain_state: DrainStates
    ) -> None:
        """Create the credit without links.

        `capacity`: returns the capacity free for new calls, and the number of slots free for resumed calls.
        `count_cached(n)`: returns how many of `n` waiting calls can resume at almost no cost; these are calls whose KV
        blocks a gateway expects on this worker.
        """
        self._capacity = capacity
        self._count_cached = count_cached
        self._drain_state = drain_state
        self._granter = CreditGranter()
        self._links: dict[int, _Acknowledgement] = {}

    def attach(self, link: int, outbox: Outbox) -> None:
        """Add a new link; grants are put into its outbox."""
        self._links[link] = _Acknowledgement(outbox)
        self._granter.attach(link)

    def detach(self, link: int) -> None:
        """Remove a link that has ended, with all credit granted to it."""
        self._links.pop(link, None)
        self._granter.detach(link)

    def record_submit(self, link: int, submit: pb.Submit, prompt_ids: bytes) -> None:
        """Subtract the credit that a received Submit uses. Invalid Submits use credit, too."""
        tokens = (len(prompt_ids) + len(submit.emitted_ids)) // 4
        self._granter.record_submit(link, tokens, 0 < submit.fresh_tokens < tokens)

    def set_backlog(self, link: int, backlog: pb.Backlog) -> None:
        """Record how many calls wait at a link's gateway."""
        self._granter.set_backlog(link, backlog.claim or backlog.waiting, self._count_cached(backlog.kept))

    def acknowledge(self, link: int, grant_id: int) -> None:
        """Record that the gateway has applied the grant `grant_id`. Later grants may still be unacknowledged."""
        self._granter.acknowledge(link, grant_id)
        waiting = self._links[link]
        waiting.since = None if grant_id >= waiting.grant_id else time.monotonic()

    def unacked_s(self, link: int) -> float:
        """Return for how many seconds the gateway has not acknowledged a grant; 0 if it has acknowledged all grants."""
        since = self._links[link].since
        return 0.0 if since is None else time.monotonic() - since

    def promised(self) -> Capacity:
        """Return the capacity granted to all links together."""
        return self._granter.promised()

    def regrant(self) -> None:
        """Grant the capacity that is free now. Call after every step and every change."""
        if self._drain_state.state is not DrainState.SERVING:
            return
        for grant in self._granter.new_grants(*self._capacity()):
            link = self._links[grant.link]
            link.outbox.grant(grant)
            link.grant_id = grant.grant_id
            if link.since is None:
                link.since = time.monotonic()
