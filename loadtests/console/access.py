"""The part `access` of the load test of the console. It counts the errors that the accessibility checker axe finds on
the console's pages. Each page is checked in the light and the dark theme, at widths of 360 and 1920 pixels."""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.console.browsers import chromium
from loadtests.console.cluster import filled
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from tests.support.browser import axe_violations, watched_page
from tests.support.console_pages import PAGES, TENANT, go

WIDTHS, SCHEMES = (360, 1920), ("light", "dark")
ROW = "axe violations on every page, light and dark, 360 px and 1920 px"
ROWS: Mapping[str, Bound | None] = {ROW: Bound("<=", 0)}


async def measure(stage: Stage) -> list[Figure]:
    """Check every page, and return the report's row. Raises RuntimeError."""
    found: list[str] = []
    looked = 0
    async with chromium() as browser, filled(stage, browser) as pages:
        call = pages.call
        names = [*PAGES, f"tenants/{TENANT}", f"calls/{call}"]
        for scheme in SCHEMES:
            for width in WIDTHS:
                size = {"width": width, "height": 900, "scheme": scheme}
                stage.screen.say(f"axe, {scheme}, {width} px")
                async with watched_page(browser, pages.console.origin, **size) as watched:  # type: ignore[arg-type]
                    await watched.page.goto(f"{pages.console.origin}/")
                    await watched.page.get_by_label("API key").wait_for()
                    found += [f"sign-in, {scheme}, {width}: {each}" for each in await axe_violations(watched.page)]
                    looked += 1
                async with pages.console.signed_in("operator", **size) as watched:  # type: ignore[arg-type]
                    for name in names:
                        await go(watched.page, name)
                        found += [f"{name}, {scheme}, {width}: {each}" for each in await axe_violations(watched.page)]
                        looked += 1
    stage.report.settings["axe violations"] = found
    return [exact(ROW, len(found), ROWS[ROW], "violations", f"{looked} looks; {found[0][:160] if found else 'none'}")]
