"""The part `pages`: loading and update times in Chromium, while 64 streams run and 20 workers report.

The first view is the time from the navigation of a signed-in browser with an empty cache until the page shows the fleet
with live data. The live update is the time from an admin request that cordons or uncordons a worker until the page
shows the change. The longest frame is the longest time between two animation frames on the pages fleet and calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from playwright.async_api import Browser, Page

from cluster.admin.v1 import admin_pb2
from cluster.cli.target.access import Access
from cluster.cli.target.admin_client import Admin
from loadtests.console import bed as beds
from loadtests.console.browsers import chromium
from loadtests.figures import Bound, Figure, mean, plain_figure
from loadtests.scenarios.common import Stage, rounds_of
from loadtests.scenarios.parts import exact
from tests.support.console_pages import shown, sign_in

WORKERS, STREAMS, TOKENS, ROOM = 20, 64, 512, 16
WATCH_S = 10.0
LATEST_MS = 60_000
VIEW = f"first view of the fleet, {STREAMS} streams and {WORKERS} workers"
UPDATE = "live update after a worker is cordoned or uncordoned"
FRAME = f"longest frame while {STREAMS} streams run and {WORKERS} workers report"
ROWS: Mapping[str, Bound | None] = {VIEW: Bound("<=", 1.0), UPDATE: Bound("<=", 1.5), FRAME: Bound("<=", 100.0)}
FRAMES = """
async (seconds) => {
  const found = [];
  const end = performance.now() + seconds * 1000;
  let before = await new Promise(requestAnimationFrame);
  while (before < end) {
    const now = await new Promise(requestAnimationFrame);
    found.push(now - before);
    before = now;
  }
  return found;
}
"""
HAS_STATE = """
([worker, state]) => [...document.querySelectorAll(".page-fleet tr")]
  .some((row) => row.textContent.includes(worker) && row.textContent.toLowerCase().includes(state))
"""


async def measure(stage: Stage) -> list[Figure]:
    """Start the processes and the browser, and return the report's rows. Raises DidNotStart, RuntimeError."""
    rounds = rounds_of(stage.options)
    bed = await beds.start(stage, "pages", WORKERS, ROOM)
    async with beds.streams(bed, STREAMS, TOKENS), chromium() as browser:
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(f"{bed.origin}/#/fleet")
        await sign_in(page, bed.operator)
        await shown(page, "fleet")
        stage.screen.say("a worker is cordoned and uncordoned")
        updates_s = await _updates(page, bed, rounds)
        frames_ms: list[float] = []
        for name in ("fleet", "calls"):
            stage.screen.say(f"the frames of the page {name} are measured")
            await page.evaluate("(name) => { location.hash = `#/${name}`; }", name)
            await shown(page, name)
            frames_ms += await page.evaluate(FRAMES, WATCH_S)
        cookies = await context.cookies()
        await context.close()
        stage.screen.say("the first view is measured")
        views_s = [await _first_view(browser, bed, cookies) for _ in range(rounds)]
    await bed.stop()
    stage.report.settings["first views, s"] = views_s
    stage.report.settings["live updates, s"] = updates_s
    late = sum(each > ROWS[FRAME].limit for each in frames_ms)  # type: ignore[union-attr]
    note = f"{len(frames_ms)} frames, {late} above the bound"
    return [
        plain_figure(VIEW, mean(views_s), "s", ROWS[VIEW], len(views_s), note=f"longest {max(views_s):.2f} s"),
        plain_figure(
            UPDATE, mean(updates_s), "s", ROWS[UPDATE], len(updates_s), note=f"longest {max(updates_s):.2f} s"
        ),
        exact(FRAME, max(frames_ms), ROWS[FRAME], "ms", note),
    ]


async def _updates(page: Page, bed: beds.ConsoleBed, rounds: int) -> list[float]:
    """Cordon and uncordon a worker in turn, and return the seconds until the page shows each change."""
    found: list[float] = []
    with closing(Admin(Access(bed.endpoints["admin"], bed.operator))) as api:
        for number in range(rounds):
            worker = f"sim-{number // 2 % WORKERS:02}"
            verb, state = ("Uncordon", "ready") if number % 2 else ("Cordon", "cordoned")
            kind = getattr(admin_pb2, f"{verb}Request")
            begun = time.monotonic()
            await asyncio.to_thread(api.fleet, verb, kind(target=worker))
            await page.wait_for_function(HAS_STATE, arg=[worker, state], timeout=LATEST_MS)
            found.append(time.monotonic() - begun)
    return found


async def _first_view(browser: Browser, bed: beds.ConsoleBed, cookies: Sequence[Any]) -> float:
    """Open the console in a fresh, signed-in browser. Return the seconds until the console shows the fleet."""
    context = await browser.new_context()
    try:
        await context.add_cookies(cookies)
        page = await context.new_page()
        await page.goto(f"{bed.origin}/#/fleet", wait_until="commit")
        await shown(page, "fleet")
        await page.wait_for_function(HAS_STATE, arg=["sim-00", "ready"], timeout=LATEST_MS)
        return float(await page.evaluate("performance.now()")) / 1000
    finally:
        await context.close()
