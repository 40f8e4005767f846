"""Tasks of people at the console, and the number of clicks that each task takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from cluster.wire.bundle import Bundle
from tests.ledger.samples import record
from tests.support.cluster import until
from tests.support.console_pages import OTHER, ConsolePages, add_workers, console_pages
from tests.support.http import chat_body
from tests.support.keyed import eventually

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

MOST_CLICKS = 4
DAY_S = 86_400.0


class Person:
    """A person who only clicks. The clicks are counted."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.clicks = 0

    async def click(self, target: Locator) -> None:
        """Click on something that is visible."""
        await target.click()
        self.clicks += 1


@asynccontextmanager
async def a_person(pages: ConsolePages) -> AsyncIterator[Person]:
    """Provide a signed-in operator on the fleet page."""
    async with pages.signed_in("operator", width=1440, height=1000) as watched:
        person = Person(watched.page)
        yield person
        assert person.clicks <= MOST_CLICKS
        assert await watched.faults() == []


@pytest.fixture(scope="module")
async def full(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[ConsolePages]:
    """Provide the console of a gateway whose only worker runs one sequence at a time. The second tenant's call has
    waited for the first tenant's call."""
    async with console_pages(tmp_path_factory.mktemp("full"), browser) as pages:
        await add_workers(pages.cluster, checkpoint, bundle, 1, decode_ms=20, max_num_seqs=1)
        first = asyncio.create_task(call(pages, pages.keys["caller"], 50))
        await until(lambda: pages.cluster.workers[0].engine.load().running == 1, "the first call runs")
        await call(pages, pages.other_key, 4)
        await first
        yield pages


async def call(pages: ConsolePages, key: str, max_tokens: int) -> None:
    """Make a call."""
    reply = await pages.keyed.fetch("/v1/chat/completions", chat_body(max_tokens=max_tokens), key=key)
    assert reply.status == 200


def nav(page: Page, name: str) -> Locator:
    """Return a link of the navigation."""
    return page.get_by_role("navigation").get_by_role("link", name=name, exact=True)


async def top_row(page: Page, table: str) -> str:
    """Return the name in the first row of a table."""
    rows = page.locator("section", has=page.get_by_role("heading", name=table, exact=True)).locator("tbody tr")
    return (await rows.first.locator("a").first.inner_text()).strip()


async def test_find_the_slowest_tenant(full: ConsolePages) -> None:
    """After clicks on Tenants and the heading TTFT, the tenant with the longest time to the first token is at the
    top."""
    async with a_person(full) as person:
        await person.click(nav(person.page, "Tenants"))
        await expect(person.page.locator("main")).to_contain_text(OTHER)
        heading = person.page.get_by_role("columnheader", name="TTFT").get_by_role("button")
        await person.click(heading)
        if await top_row(person.page, "Now") != OTHER:
            await person.click(heading)
        assert await top_row(person.page, "Now") == OTHER


async def test_find_out_why_a_call_waited(full: ConsolePages) -> None:
    """After clicks on Calls, on the heading Queue and on the call, the page says how long the call waited, and for
    what."""
    async with a_person(full) as person:
        await person.click(nav(person.page, "Calls"))
        heading = person.page.get_by_role("columnheader", name="Queue").get_by_role("button")
        await person.click(heading)
        first = person.page.locator("tbody tr").first
        if OTHER not in await first.inner_text():
            await person.click(heading)
        await expect(first).to_contain_text(OTHER)
        await person.click(first.get_by_role("link").first)
        await expect(person.page.locator(".why")).to_contain_text("for a worker")
        await expect(person.page.locator("main")).to_contain_text("Route")


async def test_find_out_who_used_most_yesterday(full: ConsolePages) -> None:
    """After clicks on Tenants and Yesterday, the tenant with the most tokens is at the top."""
    yesterday = record("y", opened_at_s=time.time() - DAY_S, model="sim")
    heavy = replace(yesterday, record_id="h", tenant=OTHER, prompt_tokens=90_000)
    await asyncio.to_thread(full.keyed.ledger.usage.insert, [yesterday, heavy])
    async with a_person(full) as person:
        await person.click(nav(person.page, "Tenants"))
        await person.click(person.page.get_by_role("button", name="Yesterday"))
        await expect(person.page.locator("main")).to_contain_text("90k")
        assert await top_row(person.page, "Usage") == OTHER


async def test_drain_a_node(busy: ConsolePages) -> None:
    """An operator clicks Drain at a worker, chooses the worker's whole node in the dialog, and confirms. Then exactly
    the workers of that node are drained."""
    async with a_person(busy) as person:
        row = person.page.locator("tr", has_text="10.0.0.3").first
        await person.click(row.get_by_role("button", name="Drain"))
        await person.click(person.page.get_by_role("radio", name="Node 10.0.0.3"))
        await person.click(person.page.get_by_role("dialog").get_by_role("button", name="Drain", exact=True))
        states = {"DRAINING", "DRAINED"}
        chips = person.page.locator("tr", has_text="10.0.0.3").locator(".chip[data-state]")
        await expect(chips.first).not_to_have_attribute("data-state", "READY")
        await until(
            lambda: all(drained(busy, w.identity.worker_id) for w in busy.cluster.workers[3::4]), "the node drains"
        )
        assert {await chip.get_attribute("data-state") for chip in await chips.all()} <= states
        assert not any(drained(busy, w.identity.worker_id) for w in busy.cluster.workers[2::4])


def drained(pages: ConsolePages, worker_id: str) -> bool:
    """Return whether the worker is drained, so that the gateway sends it no new calls."""
    return any(link.draining for link in pages.cluster.gateway.hub.links if link.identity.worker_id == worker_id)


async def test_revoke_a_key(full: ConsolePages) -> None:
    """After clicks on Tenants, on the tenant, on Revoke, and on Revoke again, the key is refused."""
    key = await full.keyed.key("leaky")
    async with a_person(full) as person:
        await person.click(nav(person.page, "Tenants"))
        await person.click(person.page.get_by_role("link", name="leaky", exact=True).first)
        await person.click(person.page.get_by_role("button", name="Revoke"))
        await person.page.get_by_label("Reason").fill("in a public repository")
        await person.click(person.page.get_by_role("dialog").get_by_role("button", name="Revoke", exact=True))
        await expect(person.page.locator(".chip[data-state=revoked]")).to_be_visible()

    async def is_refused() -> bool:
        return (await full.keyed.fetch("/v1/models", key=key)).status == 401

    await eventually(is_refused, "the key is refused")


async def test_nothing_has_a_cost_without_prices(full: ConsolePages) -> None:
    """In a cluster without prices, plots and tenants show no cost, not even 0."""
    read = "fetch('/console/history?series=cost,tokens&seconds=600').then((answer) => answer.json())"
    async with full.signed_in("operator") as watched:

        async def has_values() -> bool:
            series = (await watched.page.evaluate(read))["series"]
            assert set(series["cost"]) == {None}
            return set(series["tokens"]) != {None}

        await eventually(has_values, "there is a sample")
