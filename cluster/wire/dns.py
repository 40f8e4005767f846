"""`srv://_link._tcp.NAME`: the gateways behind a name of the DNS, asked for again every few seconds.

Kubernetes answers such a name for a headless Service with the ports and names of its pods, those that are not ready
too. An answer replaces the one before; while nobody answers the last one stands, since a gateway that is dialled in
vain costs little and one that is forgotten costs its calls. A name that is no more, or has nobody behind it, is an
answer too.
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
AGAIN_S = 3.0
"""Between two questions: how long a new gateway waits for its first link."""
ANSWER_S = 5.0

Resolve = Callable[[str], Awaitable[tuple[str, ...]]]


class NoAnswer(Exception):
    """Nobody has said who is behind the name; the message says why."""


def is_looked_up(gateway: str) -> bool:
    """Whether an entry of link.gateways names a service in place of an address."""
    return gateway.startswith(SCHEME)


async def resolve(
    name: str, resolver: dns.asyncresolver.Resolver | None = None, answer_s: float = ANSWER_S
) -> tuple[str, ...]:
    """`host:port` of each gateway behind a name, sorted; a relative name by the machine's own domains.

    Raises NoAnswer.
    """
    try:
        resolver = resolver or dns.asyncresolver.Resolver()
        answer = await resolver.resolve(name, "SRV", search=True, lifetime=answer_s)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return ()
    except (dns.exception.DNSException, OSError) as error:
        raise NoAnswer(str(error) or type(error).__name__) from None
    found = {f"{record.target.to_text(omit_final_dot=True)}:{record.port}" for record in answer}
    return tuple(sorted(found))


async def keep_asking(
    gateway: str,
    tell: Callable[[Sequence[str]], None],
    ask: Resolve = resolve,
    again_s: float = AGAIN_S,
) -> None:
    """Tell who is behind the entry `srv://...` whenever that is another answer; until cancelled."""
    name = gateway.removeprefix(SCHEME)
    known: tuple[str, ...] | None = None
    told = ""
    while True:
        try:
            now = await ask(name)
        except NoAnswer as error:
            if str(error) != told:
                log.warning("lookup_failed", name=name, reason=str(error))
            told = str(error)
        else:
            told = ""
            if now != known:
                log.info("lookup", name=name, gateways=list(now))
                tell(now)
            known = now
        await asyncio.sleep(again_s)
