"""The part `tasks`: clicks that an operator needs for five tasks, each from the fleet page.

A click is a pressed pointer button; typing a reason does not count. Each task ends with a check of its result on the
page or in the cluster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from playwright.async_api import Page, expect

from loadtests.console.browsers import chromium
from loadtests.console.cluster import FilledConsole, filled
from loadtests.figures import Bound, Figure, missing
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from tests.support.cluster import until
from tests.support.console_pages import OTHER, TENANT

MOST = Bound("<=", 4)
COUNT = "window.__clicks = 0; addEventListener('pointerdown', (event) => { window.__clicks += event.isTrusted; }, true)"
Task = Callable[[Page, FilledConsole], Awaitable[None]]


async def slowest_tenant(page: Page, pages: FilledConsole) -> None:
    """Sort the tenants by their time to first token."""
    await page.get_by_role("link", name="Tenants", exact=True).click()
    head = page.locator(".page-tenants").get_by_role("button", name="TTFT")
    await head.first.click()
    table = page.get_by_role("table", name="Tenants now")
    first = table.locator("tbody tr").first
    if OTHER not in await first.inner_text():
        await head.first.click()
    await expect(first).to_contain_text(OTHER)


async def why_a_call_waited(page: Page, pages: FilledConsole) -> None:
    """Open the page of a call, which says how long the call waited and why."""
    await page.get_by_role("link", name="Calls", exact=True).click()
    await page.get_by_role("link", name=pages.call).first.click()
    await expect(page.locator(".page-calls .why")).not_to_be_empty()
    await expect(page.get_by_role("heading", name="Route")).to_be_visible()


async def who_used_most_yesterday(page: Page, pages: FilledConsole) -> None:
    """On the page Tenants, choose yesterday. The tenant that used most is in the first row, because the table is sorted
    by tokens."""
    await page.get_by_role("link", name="Tenants", exact=True).click()
    await page.get_by_role("button", name="Yesterday").click()
    await expect(page.get_by_role("table", name="Usage by tenant").locator("tbody tr").first).to_contain_text(OTHER)


async def drain_a_node(page: Page, pages: FilledConsole) -> None:
    """Drain the node of a worker."""
    worker = pages.console.cluster.workers[0].identity
    await page.get_by_role("button", name=f"Drain {worker.worker_id}").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label(f"Node {worker.host or worker.node}").click()
    await dialog.get_by_role("button", name="Drain", exact=True).click()
    row = page.get_by_role("table", name="Workers").locator("tbody tr", has_text=worker.worker_id)
    await expect(row).to_contain_text("Drain")
    await expect(dialog).to_have_count(0)


async def revoke_a_key(page: Page, pages: FilledConsole) -> None:
    """Revoke a key of a tenant."""
    await page.get_by_role("link", name="Tenants", exact=True).click()
    await page.get_by_role("table", name="Tenants now").get_by_role("link", name=TENANT, exact=True).click()
    await page.get_by_role("button", name=f"Revoke key {pages.key_id}").click()
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Reason").fill("measured")
    await dialog.get_by_role("button", name="Revoke", exact=True).click()
    ledger = pages.console.keyed.ledger

    def is_revoked() -> bool:
        return ledger.keys.get(TENANT, pages.key_id).revoked_at is not None

    await until(is_revoked, "the key is revoked")


TASKS: Mapping[str, Task] = {
    "clicks to find the slowest tenant": slowest_tenant,
    "clicks to see why a call waited": why_a_call_waited,
    "clicks to see who used most yesterday": who_used_most_yesterday,
    "clicks to drain a node": drain_a_node,
    "clicks to revoke a key": revoke_a_key,
}
ROWS: Mapping[str, Bound | None] = dict.fromkeys(TASKS, MOST)


async def measure(stage: Stage) -> list[Figure]:
    """Do each task of an operator in a browser, and return a row with the number of clicks for each. Raises
    RuntimeError."""
    figures = []
    async with chromium() as browser, filled(stage, browser) as pages:
        for name, task in TASKS.items():
            stage.screen.say(name)
            async with pages.console.signed_in("operator") as watched:
                page = watched.page
                await page.evaluate(COUNT)
                try:
                    async with asyncio.timeout(90):
                        await task(page, pages)
                except (AssertionError, TimeoutError) as error:
                    stage.report.problems.append(f"{name}: {error}"[:2000])
                    figures.append(missing(name, MOST, "the task could not be done"))
                    continue
                figures.append(exact(name, float(await page.evaluate("window.__clicks")), MOST, "clicks"))
    return figures
