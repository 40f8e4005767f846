"""Whom to dial: the gateways that were configured, by address or by a name of the DNS, and the processes beside each,
which its Welcome names.

The processes of one host share the ports of clients and nothing else, so each needs a link of its own. Their addresses
are learnt by reach: what a configured gateway has named last, what those have named, and so on. A name in the Welcome
of a gateway that nobody reaches any more counts for nothing, else two former siblings would keep each other alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from cluster.wire import dns
from cluster.wire.dial import Timing, keep_dialing

log = structlog.get_logger("link")


@dataclass(frozen=True, slots=True)
class _Welcome:
    """The last word of whoever answers at an address; it stays when the link breaks, for the siblings live on."""

    incarnation: str
    siblings: tuple[str, ...]


class GatewayAddresses:
    """`dial` runs a session with each; sessions report their Welcome to `welcomed`."""

    def __init__(self, configured: Sequence[str], ask: dns.Resolve = dns.resolve) -> None:
        """`configured`: `host:port` each, dialled for ever, or `srv://NAME`, whose answer of the DNS (`ask`) is dialled
        as long as it stands."""
        self._configured = tuple(dict.fromkeys(one for one in configured if not dns.is_looked_up(one)))
        self._names = tuple(dict.fromkeys(one for one in configured if dns.is_looked_up(one)))
        self._looked_up: dict[str, tuple[str, ...]] = {}
        self._ask = ask
        self._welcomes: dict[str, _Welcome] = {}
        self._dialling: set[str] = set()
        self._changed = asyncio.Event()
        self.addresses = self._configured
        """All that are to be dialled, the configured first."""

    def welcomed(self, address: str, incarnation: str, siblings: Sequence[str]) -> None:
        """The gateway at `address` has named its siblings: `host:port`, or `:port` on the host that was dialled."""
        host = address.rsplit(":", 1)[0]
        resolved = tuple(host + sibling if sibling.startswith(":") else sibling for sibling in siblings)
        self._welcomes[address] = _Welcome(incarnation, resolved)
        self._update()

    def looked_up(self, name: str, addresses: Sequence[str]) -> None:
        """Who is behind a name now."""
        self._looked_up[name] = tuple(addresses)
        self._update()

    def _update(self) -> None:
        reached = self._reached()
        if reached == self.addresses:
            return
        log.info("gateways", dialled=list(reached))
        self.addresses = reached
        self._changed.set()

    def _reached(self) -> tuple[str, ...]:
        found = dict.fromkeys(
            (*self._configured, *(one for name in self._names for one in self._looked_up.get(name, ())))
        )
        at_hand = list(found)
        while at_hand:
            welcome = self._welcomes.get(at_hand.pop(0))
            for sibling in welcome.siblings if welcome else ():
                if sibling not in found and not self._is_another_name(sibling, found):
                    found[sibling] = None
                    at_hand.append(sibling)
        return tuple(found)

    def _is_another_name(self, address: str, found: dict[str, None]) -> bool:
        """Whether the process that answered there is dialled already: two links of one worker would end each other."""
        met = self._welcomes.get(address)
        return met is not None and any(
            welcome.incarnation == met.incarnation for name in found if (welcome := self._welcomes.get(name))
        )

    async def dial(self, session: Callable[[str], Awaitable[None]], timing: Timing) -> None:
        """Keep a session with each until cancelled. With one that is named no more it lasts as long as its link."""
        async with asyncio.TaskGroup() as group:
            for name in self._names:
                group.create_task(dns.keep_asking(name, partial(self.looked_up, name), self._ask))
            while True:
                self._changed.clear()
                for address in self.addresses:
                    if address not in self._dialling:
                        self._dialling.add(address)
                        group.create_task(self._keep(address, session, timing))
                await self._changed.wait()

    async def _keep(self, address: str, session: Callable[[str], Awaitable[None]], timing: Timing) -> None:
        try:
            await keep_dialing(address, session, timing, lambda: address in self.addresses)
        finally:
            self._dialling.discard(address)
        log.info("no_sibling_any_more", gateway=address)
        self._changed.set()  # it may have been named again meanwhile
