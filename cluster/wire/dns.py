"""Gateways behind a DNS name `srv://_link._tcp.NAME`, which is looked up every few seconds.

If NAME is a headless Service of Kubernetes, the answer has the ports and names of the Service's pods, including pods
that are not ready. Each answer replaces the previous answer. If a lookup gets no answer, the previous answer stays
valid: dialing a gateway in vain costs little, and forgetting a gateway loses its calls. NXDOMAIN and an empty record
set count as answers: then the name has no gateways.
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
    """Error: a DNS name could not be resolved. The message is the reason."""


def is_dns_name(gateway: str) -> bool:
    """Whether an entry of the setting link.gateways is a DNS name (`srv://`). Other entries are addresses."""
    return gateway.startswith(SCHEME)


async def resolve(
    name: str, resolver: dns.asyncresolver.Resolver | None = None, answer_s: float = ANSWER_S
) -> tuple[str, ...]:
    """Look up a DNS name (without `srv://`) and return the `host:port` of its gateways, sorted.

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
    """Look up the entry `gateway` (`srv://...`) every `interval_s` seconds until cancelled. Call `on_change` with the
    addresses when they change."""
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
