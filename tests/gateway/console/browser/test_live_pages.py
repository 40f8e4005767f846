"""The console while the cluster works: the time to the first view, smooth updates, and the view of a killed worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from cluster.wire.bundle import Bundle
from cluster.worker.engine.simulated.engine import SimEngine
from tests.support.calls import chat
from tests.support.cluster import Worker, sim_engine, until
from tests.support.console_pages import ConsolePages, go, shown
from tests.support.cpu import slowness
from tests.support.keyed import bearer

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium"), pytest.mark.thorough]

FIRST_VIEW_S = 1.0
LIVE_UPDATE_S = 1.5
LONGEST_FRAME_S = 0.1
STREAMS = 64
WATCHED_S = 2.0

FIRST_ROW = """
() => new Promise((resolve) => {
  const look = () => {
    if (document.querySelector(".page-fleet tbody tr")) resolve(performance.now());
    else requestAnimationFrame(look);
  };
  look();
})
"""
FRAMES = """
(seconds) => new Promise((resolve) => {
  let longest = 0;
  let last = performance.now();
  const until = last + seconds * 1000;
  const frame = (now) => {
    longest = Math.max(longest, now - last);
    last = now;
    if (now < until) requestAnimationFrame(frame);
    else resolve(longest);
  };
  requestAnimationFrame(frame);
})
"""


@asynccontextmanager
async def streams(pages: ConsolePages, number: int) -> AsyncIterator[None]:
    """Keep `number` calls streaming."""
    metadata, stub = bearer(pages.keys["caller"]), pages.cluster.stub

    async def stream() -> None:
        while True:
            async for _ in stub.StreamChat(chat("Tell me more", max_tokens=200, ignore_eos=True), metadata=metadata):
                pass

    tasks = [asyncio.create_task(stream()) for _ in range(number)]
    try:
        await until(lambda: pages.cluster.gateway.hub.statistics().running >= number, "all streams run")
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await pages.cluster.until_idle()


async def within(bound_s: float, measure: Callable[[], Awaitable[float]], tries: int = 3) -> float:
    """Return the first of up to `tries` measured times that is within the bound. The bound is larger on a slow or busy
    machine. Raises AssertionError with all times if none is within it."""
    found = list[str]()
    for _ in range(tries):
        before = slowness(time.monotonic)
        took_s = await measure()
        allowed = bound_s * max(before, slowness(time.monotonic))
        if took_s <= allowed:
            return took_s
        found.append(f"{took_s:.3f} s, where {allowed:.3f} s are allowed")
    raise AssertionError("; ".join(found))


async def test_first_view_live_update_and_frames(busy: ConsolePages, checkpoint: Path, bundle: Bundle) -> None:
    """With 20 workers and 64 streams, the fleet page shows rows within 1 s of its opening, and a new worker within 1.5
    s. No frame of the fleet page or the playground takes longer than 100 ms."""
    async with busy.signed_in("operator") as watched:
        page = watched.page

        async def first_view() -> float:
            await page.reload(wait_until="commit")
            return float(await page.evaluate(FIRST_ROW)) / 1000

        async def live_update() -> float:
            worker = await busy.cluster.add_worker(sim_engine(checkpoint, decode_ms=20), bundle)
            began = time.monotonic()
            await page.locator("tr", has_text=worker.identity.worker_id).first.wait_for()
            took_s = time.monotonic() - began
            await worker.stop()
            return took_s

        async def frames() -> float:
            return float(await page.evaluate(FRAMES, WATCHED_S)) / 1000

        print("first_view_s", await within(FIRST_VIEW_S, first_view))
        async with streams(busy, STREAMS):
            await shown(page, "fleet")
            print("live_update_s", await within(LIVE_UPDATE_S, live_update))
            print("longest_frame_fleet_s", await within(LONGEST_FRAME_S, frames))
            await go(page, "playground")
            await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
            await page.get_by_label("Message").fill("Tell me more")
            await page.get_by_label("Message").press("Enter")
            await expect(page.locator(".pg-answer .pg-facts")).to_contain_text("tokens")
            print("longest_frame_playground_s", await within(LONGEST_FRAME_S, frames))
            await page.get_by_role("button", name="Stop").click()
        assert await watched.faults() == []


def serving(pages: ConsolePages) -> Worker:
    """Return the worker whose engine runs a sequence."""
    return next(worker for worker in pages.cluster.workers if not worker.task.done() and worker.engine.load().running)


async def ask(page: Page, text: str) -> None:
    """Send a message in the playground and wait for the first tokens of its answer."""
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator(".pg-answer .pg-facts")).to_contain_text("tokens")


async def test_a_worker_is_killed_in_mid_answer(busy: ConsolePages, tmp_path: Path) -> None:
    """If the worker of an answer in the playground is killed, the answer continues on another worker with the same text
    as without the failure. The playground reports this. The fleet page shows the lost worker in red, with the number of
    its resumed sequences."""
    async with busy.signed_in("operator", "playground", width=1440) as chat_page, busy.signed_in(width=1440) as fleet:
        page = chat_page.page
        await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
        await page.locator("summary", has_text="Parameters").click()
        await page.get_by_label("Temperature").fill("0")
        await page.get_by_label("Max tokens").fill("120")
        await ask(page, "Tell me a story")
        await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(1)
        whole = await page.locator(".pg-answer .md").inner_text()
        await page.get_by_role("button", name="Try again").click()
        await expect(page.locator(".pg-answer .pg-facts")).to_contain_text("tokens")
        victim = serving(busy)
        assert isinstance(victim.engine, SimEngine)
        victim.engine.faults.kill()
        row = fleet.page.locator("tr.lost", has_text=victim.identity.worker_id)
        await expect(row).to_be_visible(timeout=60_000)
        await expect(row).to_contain_text("1 sequence went on elsewhere")
        await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(1, timeout=60_000)
        assert await page.locator(".pg-answer .md").inner_text() == whole
        await expect(page.locator(".pg-resumes")).to_contain_text("Resumed on another worker")
        assert await page.locator(".pg-answer .problem:visible").count() == 0
        colours = await row.evaluate(
            "(node) => [getComputedStyle(node).backgroundColor, getComputedStyle(document.body).backgroundColor]"
        )
        assert colours[0] != colours[1]
        await page.screenshot(path=tmp_path / "playground.png")
        await row.scroll_into_view_if_needed()
        await fleet.page.screenshot(path=tmp_path / "fleet.png")
        assert min((tmp_path / f"{name}.png").stat().st_size for name in ("playground", "fleet")) > 10_000
        assert await chat_page.faults() == []
        assert await fleet.faults() == []
