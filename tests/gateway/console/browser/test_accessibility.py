"""The console under axe's accessibility rules, with only a keyboard, and for each role."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from playwright.async_api import Browser, Page, expect

from tests.support.browser import axe_violations, watched_page
from tests.support.console_pages import PAGES, TENANT, ConsolePages, go
from tests.support.http import chat_body

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium"), pytest.mark.thorough]

WIDTHS = (360, 1920)
DETAILS = (f"tenants/{TENANT}",)
LOOKS = [(scheme, width) for scheme in ("light", "dark") for width in WIDTHS]


async def fill(pages: ConsolePages) -> None:
    """Make some calls, so that the pages show rows."""
    for role in ("caller", "operator"):
        await pages.keyed.fetch("/v1/chat/completions", chat_body(max_tokens=4), key=pages.keys[role])


async def overflow(page: Page) -> Sequence[str]:
    """Return the elements that are wider than the page, unless they scroll by themselves."""
    found: list[str] = await page.evaluate(
        """() => document.documentElement.scrollWidth <= innerWidth ? [] : [...document.querySelectorAll("body *")]
          .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
          .map((node) => `${node.localName}.${node.className} ${node.getBoundingClientRect().right}`)"""
    )
    return found[:5]


async def faults_in_all_looks(page: Page, name: str) -> list[object]:
    """Return the faults of a page in light and dark, narrow and wide: axe's findings, and elements that do not fit."""
    found: list[object] = []
    for scheme, width in LOOKS:
        await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        await page.set_viewport_size({"width": width, "height": 900})
        await page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)))")
        found += [(name, scheme, width, fault) for fault in (*await axe_violations(page), *await overflow(page))]
    return found


async def test_axe_finds_nothing(busy: ConsolePages) -> None:
    """No page breaks a rule of axe, and no page is wider than the window. This holds in light and dark mode and in
    narrow and wide windows."""
    await fill(busy)
    async with busy.signed_in("operator", height=900) as watched:
        page, found = watched.page, list[object]()
        for name in (*PAGES, *DETAILS):
            await go(page, name)
            if name == "playground":
                await fill_playground(page)
            found += await faults_in_all_looks(page, name)
        await page.set_viewport_size({"width": 1280, "height": 900})
        await go(page, "calls")
        await page.locator("tbody tr a").first.click()
        await expect(page.locator(".page-calls h1")).not_to_have_text("Calls")
        found += await faults_in_all_looks(page, "a call")
        assert found == []
        assert await watched.faults() == []


async def fill_playground(page: Page) -> None:
    """Have a short chat, with all settings shown."""
    await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
    await page.get_by_label("Message").fill("# Hello\n\n- a\n\n```\nx\n```")
    for group in await page.locator("summary").all():
        await group.click()
    await page.get_by_label("Max tokens").fill("8")
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(1)


async def test_axe_finds_nothing_before_sign_in(busy: ConsolePages, browser: Browser) -> None:
    """The sign-in page breaks no rule of axe, with and without an error."""
    async with watched_page(browser, busy.origin) as watched:
        page = watched.page
        await page.goto(busy.origin)
        await page.get_by_label("API key").wait_for()
        assert await faults_in_all_looks(page, "sign-in") == []
        await page.get_by_label("API key").fill("hr_wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator(".problem")).to_be_visible()
        assert await faults_in_all_looks(page, "a refused sign-in") == []
        assert await page.get_by_label("API key").get_attribute("type") == "password"


async def test_an_empty_cluster_breaks_no_rule(empty: ConsolePages) -> None:
    """Pages without data say what is missing, and break no rule of axe."""
    async with empty.signed_in("operator") as watched:
        for name in PAGES:
            await go(watched.page, name)
            assert await axe_violations(watched.page) == [], name
            assert len(await watched.page.locator("main").inner_text()) > 40
        assert await watched.faults() == []


@pytest.mark.parametrize("role", ["operator", "viewer", "tenant_admin", "caller"])
async def test_a_role_sees_what_it_may(busy: ConsolePages, role: str) -> None:
    """Only operators and viewers see workers, and only operators have buttons that change the cluster. People of a
    tenant see neither workers nor other tenants on any page."""
    await fill(busy)
    is_tenant = role in ("tenant_admin", "caller")
    async with busy.signed_in(role, width=1440) as watched:
        page = watched.page
        links = await page.locator("nav a").all_inner_texts()
        assert ("Scaling" in links) is not is_tenant
        for name in PAGES:
            if name == "scaling" and is_tenant:
                continue
            await go(page, name)
            text = await page.locator("main").inner_text()
            if is_tenant:
                assert "sim-w" not in text, (name, "shows a worker")
                assert "ops" not in text.split(), (name, "shows another tenant")
                assert "globex" not in text, (name, "shows another tenant")
            elif name == "fleet":
                assert "sim-w" in text
            changing = page.get_by_role("button", name=re.compile("^(Drain|Cordon|Uncordon|Freeze|Unfreeze|Scale)"))
            assert (await changing.count() > 0) is (role == "operator" and name in ("fleet", "scaling")), name
        assert await watched.faults() == []


async def test_the_console_works_by_keyboard(busy: ConsolePages, browser: Browser) -> None:
    """With only a keyboard, a person can sign in, skip to the content, open every page, drain, cancel and chat. The
    focus is always visible."""
    async with watched_page(browser, busy.origin) as watched:
        page = watched.page
        await page.goto(busy.origin)
        await expect(page.get_by_label("API key")).to_be_focused()
        await page.keyboard.type(busy.keys["operator"])
        await page.keyboard.press("Enter")
        await page.wait_for_selector(".shell")
        await page.locator("body").press("Tab")
        await tab_to(page, "Skip to the content")
        await page.keyboard.press("Enter")
        await expect(page.locator("main")).to_be_focused()
        await tab_to(page, "Drain sim-w")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog")).to_be_visible()
        assert await page.evaluate("document.querySelector('dialog').contains(document.activeElement)")
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("dialog")).to_have_count(0)
        assert (await focused(page)).startswith("Drain sim-w"), "the focus is back where it was"
        for name in ("Calls", "Tenants", "Scaling", "Playground"):
            await tab_to(page, name, back=True)
            await page.keyboard.press("Enter")
            await expect(page.locator("h1")).to_have_text(name)
        await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
        await tab_to(page, "Message")
        await page.keyboard.type("Hello")
        await page.keyboard.press("Enter")
        await tab_to(page, "Stop")
        await page.keyboard.press("Enter")
        await expect(page.locator(".pg-facts").first).to_contain_text("stopped by you")
        await expect(page.get_by_label("Message")).to_be_focused()
        assert await watched.faults() == []


async def tab_to(page: Page, name: str, *, back: bool = False, most: int = 120) -> None:
    """Press Tab until the focus is on an element whose name begins with `name`."""
    for _ in range(most):
        if (await focused(page)).startswith(name):
            assert await page.evaluate(
                "(s => s.outlineStyle !== 'none' || s.boxShadow !== 'none')(getComputedStyle(document.activeElement))"
            ), f"the focus on {name} is not visible"
            return
        await page.keyboard.press("Shift+Tab" if back else "Tab")
    raise AssertionError(f"no element {name!r} within {most} steps")


async def focused(page: Page) -> str:
    """Return the name of the element that has the focus."""
    name: str = await page.evaluate(
        """() => { const e = document.activeElement;
        return (e.labels?.[0]?.textContent || e.getAttribute("aria-label") || e.textContent || "").trim(); }"""
    )
    return name
