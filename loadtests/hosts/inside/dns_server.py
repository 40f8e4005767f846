"""Program that serves the DNS names of a cluster to the simulated pods on this host.

Run it as `python -m loadtests.hosts.inside.dns_server ZONE`. ZONE is a JSON file {"hosts": {name: [address]}, "srv":
{name: [[target, port]]}}, read again whenever it changes. Addresses are shuffled for each question, so that callers
are spread over pods as a Kubernetes Service does.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any, cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

TTL_S = 5
PORT = 53


class Zone:
    """Current content of the zone file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._stamp = 0
        self._data: dict[str, Any] = {"hosts": {}, "srv": {}}

    def answer(self, wire: bytes) -> bytes:
        """Return the answer to one DNS question."""
        query = dns.message.from_wire(wire)
        response = dns.message.make_response(query)
        response.flags |= dns.flags.AA | dns.flags.RA
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True).lower()
        data = self._now()
        if name not in data["hosts"] and name not in data["srv"]:
            response.set_rcode(dns.rcode.NXDOMAIN)
        elif question.rdtype == dns.rdatatype.A and (addresses := data["hosts"].get(name)):
            texts = random.sample(addresses, len(addresses))
            response.answer.append(dns.rrset.from_text_list(question.name, TTL_S, "IN", "A", texts))
        elif question.rdtype == dns.rdatatype.SRV and (targets := data["srv"].get(name)):
            texts = [f"0 50 {port} {target}." for target, port in targets]
            response.answer.append(dns.rrset.from_text_list(question.name, TTL_S, "IN", "SRV", texts))
        return response.to_wire()

    def _now(self) -> dict[str, Any]:
        stamp = self._file.stat().st_mtime_ns
        if stamp != self._stamp:
            self._data, self._stamp = json.loads(self._file.read_text()), stamp
        return self._data


class Listener(asyncio.DatagramProtocol):
    """Server of DNS answers over UDP."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Handle the open socket: store the transport."""
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Handle a datagram: answer one DNS question."""
        if self._transport is not None:
            self._transport.sendto(self._zone.answer(data), addr)


async def main(file: Path) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: Listener(Zone(file)), local_addr=("0.0.0.0", PORT))  # noqa: S104
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
