"""Sign-in with an OpenID issuer in Chromium. For the browser, the issuer is another site than the console, so the
browser's rules for cookies of other sites apply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import oidc_provider_mock  # type: ignore[import-untyped]
import pytest
from playwright.async_api import Browser, Page, expect

from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.ports import free_port
from tests.support.cluster import running_cluster, until
from tests.support.keyed import PEPPER, keyed_text

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

USERS = {"ada": {"org": "acme", "role": "operator"}, "carl": {"org": "acme"}}


@pytest.fixture(scope="module")
async def origin(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """Provide the address of a console on 127.0.0.1. Its issuer is on localhost, which is another site for a
    browser."""
    folder, port = tmp_path_factory.mktemp("oidc"), free_port()
    users = [oidc_provider_mock.User(sub=name, claims=claims) for name, claims in USERS.items()]
    with ExitStack() as stack:
        server = stack.enter_context(oidc_provider_mock.run_server_in_thread(0, user_claims=users))
        issuer, public = f"http://localhost:{server.server_port}", f"http://127.0.0.1:{port}"
        (folder / "client-secret").write_text("s3cret\n")
        client = f"{{issuer: '{issuer}', client_id: console, client_secret_file: {folder / 'client-secret'}}}"
        console = f"{{public_url: '{public}', oidc: {client}}}"
        auth = (
            f"auth: {{cluster_secret_file: {folder / 'secret'}, oidc: [{{issuer: '{issuer}', audience: headrace, "
            "tenant_claim: org, role_claim: role}]}\n"
        )
        text = keyed_text(folder, auth, f"  console: {console}\n")
        text = text.replace('http: "127.0.0.1:0"', f'http: "127.0.0.1:{port}"')
        async with running_cluster(folder / "gateway", text) as cluster:
            ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}", peppers=(PEPPER.encode(),))
            await asyncio.to_thread(ledger.tenants.create, TenantPolicy("acme"))
            ledger.close()
            tenants = cluster.gateway.tenants
            assert tenants is not None
            await until(lambda: "acme" in tenants.snapshot().tenants, "the tenant is known")
            yield public


@asynccontextmanager
async def opened(browser: Browser, origin: str) -> AsyncIterator[Page]:
    """Open the console in a fresh browser context that may reach the issuer."""
    context = await browser.new_context()
    try:
        page = await context.new_page()
        await page.goto(origin)
        yield page
    finally:
        await context.close()


async def sign_in(page: Page, user: str) -> None:
    """Go to the issuer and sign in there."""
    await page.get_by_role("link", name="Sign in with your organisation").click()
    await page.locator("input[name=sub]").fill(user)
    await page.locator("form button").first.click()


async def test_a_person_signs_in(browser: Browser, origin: str) -> None:
    """After the redirect from the issuer back to the console, a person is signed in, and stays signed in after a
    reload. The page's scripts can read no credential."""
    async with opened(browser, origin) as page:
        await sign_in(page, "ada")
        await page.wait_for_selector(".shell")
        assert page.url.startswith(f"{origin}/")
        cookies = {cookie["name"]: cookie for cookie in await page.context.cookies(origin)}
        assert set(cookies) == {"headrace"}
        assert (cookies["headrace"]["httpOnly"], cookies["headrace"]["sameSite"]) == (True, "Strict")
        await page.reload()
        await page.wait_for_selector(".shell")
        assert await page.evaluate("document.cookie") == ""
        assert await page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])") == "[{},{}]"


async def test_the_page_says_why(browser: Browser, origin: str) -> None:
    """A person who may not use the console is redirected to the sign-in page, which shows the reason once."""
    async with opened(browser, origin) as page:
        await sign_in(page, "carl")
        await expect(page.get_by_role("status").filter(has_text="Your role may not use this console")).to_be_visible()
        assert page.url == f"{origin}/"
        await page.reload()
        await page.get_by_role("link", name="Sign in with your organisation").wait_for()
        assert await page.get_by_text("Your role may not use").count() == 0
