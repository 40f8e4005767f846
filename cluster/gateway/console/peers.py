"""The other gateway processes of a cluster, as the console sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from cluster.gateway.console.parts import Part


class Peers(Protocol):
    """The other gateway processes: those of this host, and those of other hosts."""

    def is_watched(self, now: float) -> bool:
        """Whether another process needs this process's parts."""

    def watch(self, now: float) -> None:
        """Ask the others for their parts, for the next seconds."""

    async def publish(self, part: Part, now: float) -> None:
        """Give this process's part to the others, if one of them watches."""

    async def parts(self, now: float) -> Sequence[Part]:
        """Return the newest part of each other process."""


class NoPeers:
    """Stands for the other processes where there is one process only."""

    def is_watched(self, now: float) -> bool:
        """See Peers."""
        return False

    def watch(self, now: float) -> None:
        """See Peers."""

    async def publish(self, part: Part, now: float) -> None:
        """See Peers."""

    async def parts(self, now: float) -> Sequence[Part]:
        """See Peers."""
        return ()


NO_PEERS: Final = NoPeers()
