"""Tests of the open links of a worker: when a gateway counts as lost, and which reason gateways get when the engine has
ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

from cluster.worker.link import Link
from cluster.worker.link_runner import GATEWAY_SILENT_S, OpenLinks


@dataclass
class Beats:
    """The heartbeats of a link. `silent_s`: seconds since the gateway's last beat."""

    silent_s: float = 0.0


@dataclass
class Reasons:
    """A fake outbox. It records the reasons that the worker reports for the end of the engine."""

    reasons: list[str] = field(default_factory=list)

    def engine_ended(self, reason: str) -> None:
        """Record a reason."""
        self.reasons.append(reason)


@dataclass
class FakeLink:
    """A fake of those parts of a worker's link that OpenLinks uses."""

    number: int
    incarnation: str
    heartbeats: Beats = field(default_factory=Beats)
    outbox: Reasons = field(default_factory=Reasons)


def added(links: OpenLinks, number: int, incarnation: str) -> FakeLink:
    """Add a link, and return it."""
    link = FakeLink(number, incarnation)
    links.add(cast(Link, link))
    return link


def test_a_gateway_is_lost_once_no_link_to_it_has_beats() -> None:
    """A gateway without links is lost. A gateway with several links is lost once all of them are silent."""
    links = OpenLinks()
    first, second = added(links, 1, "a"), added(links, 2, "a")
    assert not links.is_gateway_lost("a")
    assert links.is_gateway_lost("b")
    first.heartbeats.silent_s = 2 * GATEWAY_SILENT_S
    assert not links.is_gateway_lost("a")
    second.heartbeats.silent_s = 2 * GATEWAY_SILENT_S
    assert links.is_gateway_lost("a")
    for link in (first, second):
        links.remove(cast(Link, link))
    assert len(links) == 0
    assert links.is_gateway_lost("a")


async def test_every_gateway_gets_the_first_reason_and_closes_its_link() -> None:
    """If several reasons are recorded for an engine's end, gateways get the first one that is not empty.
    `report_engine_end` returns when all gateways have closed their links."""
    links = OpenLinks()
    await links.report_engine_end()  # the engine runs: nothing to report
    link = added(links, 1, "a")
    for reason in ("", "out of memory", "closed"):
        links.record_engine_end(reason)
    report = asyncio.create_task(links.report_engine_end())
    await asyncio.sleep(0)
    assert link.outbox.reasons == ["out of memory"]
    assert not report.done()
    links.remove(cast(Link, link))
    await report
