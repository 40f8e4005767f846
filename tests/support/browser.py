"""Debian's Chromium for tests of the console, with accessibility checks by axe.

Pages can reach only their own host.
"""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.async_api import Browser, Page, Route, async_playwright

from cluster.cli.commands import doctor

STATIC = Path(__file__).resolve().parents[2] / "cluster" / "gateway" / "console" / "static"
ARGUMENTS = ["--no-sandbox", "--disable-background-networking"]
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
BARE_ORIGIN = "http://console.test"
WATCH = """
window.__violations = [];
window.__ran = [];
document.addEventListener("securitypolicyviolation", (event) => {
  if (!window.__axe) window.__violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
for (const name of ["alert", "confirm", "prompt", "print"]) window[name] = (...given) => { window.__ran.push(name); };
window.open = (...given) => { window.__ran.push(`open ${given[0]}`); return null; };
"""
"""Runs in each page before its own scripts. Payloads call `alert` or `__ran.push`."""


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run Chromium without a window."""
    finding = doctor.check_chromium()
    assert not finding.missing, doctor.missing_reason("chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=finding.found, args=ARGUMENTS)
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Watched:
    """A page, and its faults: requests to other hosts, dialogs and errors."""

    page: Page
    origin: str
    outside: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    async def faults(self) -> list[str]:
        """Return descriptions of the page's faults.

        A fault is a dialog, a function call that came from data shown on the page, a request to another host, a
        violation of the content security policy, or an error of the page's own scripts.
        """
        found: list[str] = await self.page.evaluate("[...window.__ran, ...window.__violations]")
        return [*found, *self.outside, *self.dialogs, *self.errors]


@asynccontextmanager
async def watched_page(
    browser: Browser, origin: str, *, width: int = 1280, height: int = 800, scheme: str = "light"
) -> AsyncIterator[Watched]:
    """Open an empty page in a browser context of its own. Requests to any other origin are recorded and fail."""
    dark = scheme == "dark"
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
        timezone_id="Europe/Berlin",
    )
    page = await context.new_page()
    watched = Watched(page, origin)

    async def guard(route: Route) -> None:
        url = route.request.url
        if url.startswith(f"{origin}/console/csp-report"):
            watched.outside.append(f"report of the policy: {route.request.post_data}")
        if urlsplit(url).scheme in ("data", "blob") or url.startswith(f"{origin}/"):
            await route.fallback()
        else:
            watched.outside.append(url)
            await route.abort()

    await context.route("**/*", guard)
    await context.add_init_script(WATCH)
    page.on("dialog", lambda dialog: watched.dialogs.append(dialog.message))
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    context.on("page", lambda opened: watched.outside.append(f"new page {opened.url}") if opened != page else None)
    try:
        yield watched
    finally:
        await context.close()


@asynccontextmanager
async def bare_page(browser: Browser, body: str = "") -> AsyncIterator[Watched]:
    """Open a page with the console's static files and content security policy, without a gateway."""
    async with watched_page(browser, BARE_ORIGIN) as watched:
        await watched.page.route(f"{BARE_ORIGIN}/**", lambda route: _static(route, body))
        await watched.page.goto(f"{BARE_ORIGIN}/")
        yield watched


async def _static(route: Route, body: str) -> None:
    path = urlsplit(route.request.url).path
    file = STATIC / path.removeprefix("/console/static/")
    headers = {"content-security-policy": CSP}
    if path == "/":
        html = f'<!doctype html><html lang="en"><title>t</title><body>{body}</body></html>'
        await route.fulfill(body=html, content_type="text/html", headers=headers)
    elif path.startswith("/console/static/") and file.is_file():
        kind = mimetypes.guess_type(file.name)[0] or "text/plain"
        await route.fulfill(body=file.read_bytes(), content_type=kind, headers=headers)
    else:
        await route.fulfill(status=404, body="")


async def axe_violations(page: Page) -> list[str]:
    """Return the accessibility violations that axe finds in a page: rule, element and remedy."""
    await page.evaluate("window.__axe = true")
    await page.evaluate(AXE_SCRIPT)
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    await page.evaluate("window.__axe = false")
    return [
        f"{violation['id']}: {node['target']} {node['html'][:200]} ({node.get('failureSummary', '')})"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
