"""The console of a running gateway in Chromium, for tests: sign-in by role, navigation, and a cluster to look at."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.async_api import Browser, Page

from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from tests.support.admin import role_key
from tests.support.browser import Watched, watched_page
from tests.support.cluster import PATIENT, TestCluster, sim_engine
from tests.support.keyed import Keyed, keyed_cluster

TENANT, OTHER = "acme", "globex"
OPERATIONS = "ops"
ROLES = {"operator": OPERATIONS, "viewer": OPERATIONS, "tenant_admin": TENANT, "caller": TENANT}
"""The tenant to which the key of each role belongs."""
PAGES = ("fleet", "calls", "tenants", "scaling", "playground")
LATEST_MS = 30_000


@dataclass
class ConsolePages:
    """A gateway with keys for each role, and the browser that opens its console."""

    keyed: Keyed
    browser: Browser
    keys: dict[str, str] = field(default_factory=dict)
    other_key: str = ""
    """A caller's key of another tenant."""

    @property
    def cluster(self) -> TestCluster:
        """The cluster behind the console."""
        return self.keyed.cluster

    @property
    def origin(self) -> str:
        """The console's address."""
        return f"http://{self.cluster.gateway.endpoints['http']}"

    @asynccontextmanager
    async def signed_in(
        self,
        role: str = "operator",
        page: str = "fleet",
        *,
        width: int = 1280,
        height: int = 800,
        scheme: str = "light",
    ) -> AsyncIterator[Watched]:
        """Sign in with the key of a role in a fresh browser, and open a page."""
        async with watched_page(self.browser, self.origin, width=width, height=height, scheme=scheme) as watched:
            answer = await watched.page.context.request.post(
                f"{self.origin}/console/sign-in", data={"key": self.keys[role]}, headers={"origin": self.origin}
            )
            assert answer.status == 204, await answer.text()
            await watched.page.goto(f"{self.origin}/#/{page}")
            await shown(watched.page, page)
            yield watched


async def sign_in(page: Page, key: str) -> None:
    """Enter a key in the sign-in page."""
    await page.get_by_label("API key").fill(key)
    await page.get_by_role("button", name="Sign in", exact=True).click()
    await page.wait_for_selector(".shell", timeout=LATEST_MS)


async def go(page: Page, name: str) -> None:
    """Open a page of the console by changing the URL's fragment."""
    await page.evaluate("(name) => { location.hash = `#/${name}`; }", name)
    await shown(page, name)


async def shown(page: Page, name: str) -> None:
    """Wait until a page of the console is shown with live data."""
    place = name.split("/")[0].split("?")[0]
    await page.wait_for_selector(f".page-{place} h1", timeout=LATEST_MS)
    assert await page.locator(".problem", has_text="cannot be shown").count() == 0
    await page.wait_for_selector(".connection .chip[data-tone=good]", timeout=LATEST_MS)


@asynccontextmanager
async def console_pages(
    folder: Path, browser: Browser, *, more: str = "", gateway: str = "", timing: Timing = PATIENT
) -> AsyncIterator[ConsolePages]:
    """Run a gateway whose console admits every role. The gateway has no workers."""
    settings = f"  console: {{tenants: true}}\n{gateway}"
    async with keyed_cluster(folder, more, settings, timing) as keyed:
        pages = ConsolePages(keyed, browser)
        for role, tenant in ROLES.items():
            pages.keys[role] = await role_key(keyed.ledger, tenant, role)
        pages.other_key = await keyed.key(OTHER)
        yield pages


async def add_workers(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, number: int, **parameters: object
) -> None:
    """Add simulated workers on four nodes with two GPUs each."""
    for i in range(number):
        engine = sim_engine(checkpoint, **parameters)
        await cluster.add_worker(engine, bundle, node=f"node-{i % 4}", host=f"10.0.0.{i % 4}", pod=f"sim-{i}")
