"""Gateways behind a DNS name `srv://_link._tcp.NAME`, which is resolved again every few seconds.

For such a name of a headless Service, Kubernetes answers with the ports and names of the Service's pods, including pods
that are not ready. An answer replaces the previous answer. Without a new answer the last answer stays valid: dialing a
gateway in vain costs little, and forgetting a gateway loses its calls. NXDOMAIN and an empty record set are answers,
too: after one of them, the name has no gateways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import dns.asyncresolver
import dns.exception
import dns.resolver
import structlog

log = structlog.get_logger("link")

SCHEME = "srv://"
LOOKUP_INTERVAL_S = 3.0
"""Interval of lookups in seconds, and so the longest time until a new gateway gets its first link."""
ANSWER_S = 5.0

Resolve = Callable[[str], Awaitable[tuple[str, ...]]]


class NoAnswer(Exception):
    """Error: a DNS name could not be resolved; the message is the reason."""


def is_dns_name(gateway: str) -> bool:
    """Whether an entry of link.gateways is a DNS name (`srv://`) rather than an address."""
    return gateway.startswith(SCHEME)


async def resolve(
    name: str, resolver: dns.asyncresolver.Resolver | None = None, answer_s: float = ANSWER_S
) -> tuple[str, ...]:
    """Resolve a name (without `srv://`) to the sorted `host:port` of its gateways.

    The machine's search domains apply. Raises NoAnswer.
    """
    try:
        resolver = resolver or dns.asyncresolver.Resolver()
        answer = await resolver.resolve(name, "SRV", search=True, lifetime=answer_s)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return ()
    except (dns.exception.DNSException, OSError) as error:
        raise NoAnswer(str(error) or type(error).__name__) from None
    addresses = {f"{record.target.to_text(omit_final_dot=True)}:{record.port}" for record in answer}
    return tuple(sorted(addresses))


async def keep_resolving(
    gateway: str,
    on_change: Callable[[Sequence[str]], None],
    lookup: Resolve = resolve,
    interval_s: float = LOOKUP_INTERVAL_S,
) -> None:
    """Look up the entry `gateway` (`srv://...`) periodically; call `on_change` with its addresses when they change.
    Runs until cancelled."""
    name = gateway.removeprefix(SCHEME)
    known: tuple[str, ...] | None = None
    logged_error = ""
    while True:
        try:
            current = await lookup(name)
        except NoAnswer as error:
            if str(error) != logged_error:
                log.warning("dns.lookup_failed", name=name, reason=str(error))
            logged_error = str(error)
        else:
            logged_error = ""
            if current != known:
                log.info("dns.addresses_changed", name=name, gateways=list(current))
                on_change(current)
            known = current
        await asyncio.sleep(interval_s)
