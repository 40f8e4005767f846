"""Addresses of the gateways that a worker or controller dials: configured addresses, DNS names and siblings.

Siblings are gateway processes on one host. They share the client ports, but a worker needs a link to each of them. So a
gateway's first message on a link, the Welcome, lists its siblings. An address is dialled if it is configured, or if the
last Welcome of another dialled address lists it. The list of dialled addresses is always built anew from the configured
addresses: otherwise two former siblings could keep each other in the list.
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
    """The last Welcome from an address. (A Welcome is a gateway's first message on a link.) It is kept after the link
    breaks, because the siblings that it lists may still run."""

    incarnation: str
    siblings: tuple[str, ...]


class GatewayAddresses:
    """The known gateway addresses. `dial` runs a session with each gateway. Each session must pass the gateway's
    Welcome (its first message) to `record_welcome`, because the message may name further addresses."""

    def __init__(
        self,
        configured: Sequence[str],
        resolve: dns.Resolve = dns.resolve,
        choose: Callable[[Sequence[str]], tuple[str, ...]] = tuple,
    ) -> None:
        """`configured`: addresses `host:port` and DNS names `srv://NAME`. `resolve`: looks up a NAME; the addresses in
        its last answer count as known. `choose`: selects the addresses to dial from the known addresses; by default
        all."""
        self._choose = choose
        self._configured = tuple(dict.fromkeys(entry for entry in configured if not dns.is_dns_name(entry)))
        self._names = tuple(dict.fromkeys(entry for entry in configured if dns.is_dns_name(entry)))
        self._looked_up: dict[str, tuple[str, ...]] = {}
        self._resolve = resolve
        self._welcomes: dict[str, _Welcome] = {}
        self._dialling: set[str] = set()
        self._changed = asyncio.Event()
        self.addresses = choose(self._configured)
        """The addresses to dial, with the configured addresses first."""

    def record_welcome(self, address: str, incarnation: str, siblings: Sequence[str]) -> None:
        """Record the Welcome (the first message) of the gateway at `address`. `siblings`: addresses of the other
        gateway processes on its host, as `host:port`, or as `:port` for the host of `address`."""
        host = address.rsplit(":", 1)[0]
        resolved = tuple(host + sibling if sibling.startswith(":") else sibling for sibling in siblings)
        self._welcomes[address] = _Welcome(incarnation, resolved)
        self._update()

    def set_lookup(self, name: str, addresses: Sequence[str]) -> None:
        """Record the addresses to which a DNS name resolves now."""
        self._looked_up[name] = tuple(addresses)
        self._update()

    def _update(self) -> None:
        reached = self._reached()
        dialled = self._choose(reached)
        if dialled == self.addresses:
            return
        log.info("link.gateways_chosen", known=len(reached), dialled=list(dialled))
        self.addresses = dialled
        self._changed.set()

    def _reached(self) -> tuple[str, ...]:
        addresses = dict.fromkeys(
            (*self._configured, *(address for name in self._names for address in self._looked_up.get(name, ())))
        )
        queue = list(addresses)
        while queue:
            welcome = self._welcomes.get(queue.pop(0))
            for sibling in welcome.siblings if welcome else ():
                if sibling not in addresses and not self._is_dialled_by_other_name(sibling, addresses):
                    addresses[sibling] = None
                    queue.append(sibling)
        return tuple(addresses)

    def _is_dialled_by_other_name(self, address: str, addresses: dict[str, None]) -> bool:
        """Return whether the gateway process at `address` also has another address in `addresses`. Only one of its
        addresses may be dialled, because two links of one worker to one process would end each other."""
        last_welcome = self._welcomes.get(address)
        return last_welcome is not None and any(
            welcome.incarnation == last_welcome.incarnation
            for name in addresses
            if (welcome := self._welcomes.get(name))
        )

    async def dial(self, session: Callable[[str], Awaitable[None]], timing: Timing) -> None:
        """Keep a session with each gateway until cancelled. If a gateway leaves the list, its running session
        continues, but the gateway is not dialled again."""
        async with asyncio.TaskGroup() as group:
            for name in self._names:
                group.create_task(dns.keep_resolving(name, partial(self.set_lookup, name), self._resolve))
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
        log.info("link.gateway_removed", gateway=address)
        self._changed.set()  # the address may be in the list again
