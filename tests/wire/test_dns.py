"""Tests of gateways behind a DNS name. Their addresses are looked up at a real name server on loopback. A gateway is
dialled as long as the server's answers list its address."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import cast

import dns.asyncresolver
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest

from cluster.wire import dns as lookup
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.dial import Timing
from tests.support.loop_clock import LoopClock

NAME = "_link._tcp.headrace-links"
DOMAIN = "ns.svc.cluster.test"


class Zone(asyncio.DatagramProtocol):
    """A name server. `records`: the SRV records of NAME in DOMAIN; None: the server does not answer."""

    def __init__(self) -> None:
        self.records: list[str] | None = []
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, on which answers are sent."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Answer one DNS query."""
        if self.records is None:
            return
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        asked = question.question[0].name.to_text(omit_final_dot=True)
        if asked == f"{NAME}.{DOMAIN}" and self.records:
            records = (f"0 50 {record.rsplit(':', 1)[1]} {record.rsplit(':', 1)[0]}." for record in self.records)
            answer.answer.append(dns.rrset.from_text(f"{asked}.", 5, "IN", "SRV", *records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        assert self._transport is not None
        self._transport.sendto(answer.to_wire(), addr)


@contextlib.asynccontextmanager
async def name_server() -> AsyncIterator[tuple[Zone, dns.asyncresolver.Resolver]]:
    """Start a name server, and return it with a resolver. Like a pod's resolver, it tries the search domain first for
    names with few dots."""
    transport, zone = await asyncio.get_running_loop().create_datagram_endpoint(Zone, local_addr=("127.0.0.1", 0))
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], transport.get_extra_info("sockname")[1]
    resolver.search, resolver.ndots = [dns.name.from_text(DOMAIN)], 5
    try:
        yield zone, resolver
    finally:
        transport.close()


async def test_a_name_becomes_addresses() -> None:
    """A DNS name is resolved to sorted addresses with ports. An unknown name is resolved to no addresses."""
    async with name_server() as (zone, resolver):
        zone.records = [f"g1.{DOMAIN}:50052", f"g0.{DOMAIN}:50053"]
        assert await lookup.resolve(NAME, resolver) == (f"g0.{DOMAIN}:50053", f"g1.{DOMAIN}:50052")
        zone.records = []
        assert await lookup.resolve(NAME, resolver) == ()


async def test_silence_is_no_answer() -> None:
    """`resolve` raises NoAnswer if the name server does not answer. If the name server answers without records, it
    returns no addresses."""
    async with name_server() as (zone, resolver):
        zone.records = None
        async with LoopClock() as clock:
            with pytest.raises(lookup.NoAnswer):
                await lookup.resolve(NAME, resolver, answer_s=0.05)
            assert clock.now_s < 2


async def test_answers_are_told_when_they_change_and_stand_while_there_is_none() -> None:
    """The last DNS answer stays valid while lookups fail, and an answer that equals the last one is not reported
    again."""
    answers: list[tuple[str, ...] | None] = [("a:1",), ("a:1",), None, ("a:1",), (), ("b:2",)]
    reported: list[tuple[str, ...]] = []
    done = asyncio.Event()

    async def ask(name: str) -> tuple[str, ...]:
        assert name == NAME
        if not answers:
            done.set()
            await asyncio.Event().wait()
        answer = answers.pop(0)
        if answer is None:
            raise lookup.NoAnswer("away")
        return answer

    asking = asyncio.create_task(
        lookup.keep_resolving(f"srv://{NAME}", lambda now: reported.append(tuple(now)), ask, interval_s=0)
    )
    await done.wait()
    asking.cancel()
    assert reported == [("a:1",), (), ("b:2",)]


async def test_who_is_named_is_dialled_and_who_is_named_no_more_is_kept_until_its_link_ends() -> None:
    """After the DNS answer changes, new gateways are dialled at once. The links to gateways that are no longer listed
    stay up."""
    answers: asyncio.Queue[tuple[str, ...]] = asyncio.Queue()
    up: dict[str, asyncio.Event] = {}
    changed = asyncio.Condition()

    async def session(address: str) -> None:
        up[address] = asyncio.Event()
        async with changed:
            changed.notify_all()
        try:
            await up[address].wait()
        finally:
            del up[address]

    async def until_up(*addresses: str) -> None:
        async with changed:
            await changed.wait_for(lambda: sorted(up) == sorted(addresses))

    async def ask(name: str) -> tuple[str, ...]:
        return await answers.get()

    gateways = GatewayAddresses(["fixed:1", f"srv://{NAME}"], resolve=ask)
    dialling = asyncio.create_task(gateways.dial(session, Timing(redial_min_s=0.001, redial_max_s=0.01)))
    await until_up("fixed:1")
    gateways.set_lookup(f"srv://{NAME}", ["a:1", "b:1"])
    assert gateways.addresses == ("fixed:1", "a:1", "b:1")
    await until_up("fixed:1", "a:1", "b:1")
    gateways.set_lookup(f"srv://{NAME}", ["b:1", "c:1"])
    await until_up("fixed:1", "a:1", "b:1", "c:1")
    up["a:1"].set()
    up["b:1"].set()
    async with changed:  # b is dialled again, a is not
        await changed.wait_for(lambda: "b:1" in up and not up["b:1"].is_set())
    assert sorted(up) == ["b:1", "c:1", "fixed:1"], "a is not listed any more"
    dialling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await dialling
