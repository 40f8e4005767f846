"""Make the pictures of docs/console: `python -m scripts.console_screenshots`.

The script starts a cluster in this process and opens its console in Chromium. Workers are simulated, and the past hour
in the charts is made up. Pictures are written with at most 64 colours, which keeps the files small.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import structlog
from PIL import Image
from playwright.async_api import Browser, Page

from cluster.wire.bundle import Bundle
from tests.support.browser import chromium
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of
from tests.support.console_pages import go
from tests.support.console_scene import Scene, console_scene

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "console"
COLOURS = 64
WIDTH = 1280
SETTLE_MS = 1000
"""Time for the rates of new calls to appear, in milliseconds."""


async def fleet(page: Page, scene: Scene) -> None:
    """Show the page of the workers, with a worker that was lost a moment ago."""
    await go(page, "fleet")
    lost = await scene.lose_a_worker()
    await page.locator("tr.lost", has_text=lost.identity.worker_id).wait_for()


async def call(page: Page, scene: Scene) -> None:
    """Show the page of a call that has moved to another worker."""
    await go(page, "calls")
    resumed = page.locator("tbody tr", has_text="resume").first
    await resumed.wait_for()
    await resumed.get_by_role("link").first.click()
    await page.locator(".steps").wait_for()


async def tenant(page: Page, scene: Scene) -> None:
    """Show the page of a tenant with its limits, charts and keys."""
    await go(page, "tenants/acme")
    await page.locator("main", has_text="Tokens a day").wait_for()


async def scaling(page: Page, scene: Scene) -> None:
    """Show the page of the wanted and the actual replicas, with the reasons for the decisions."""
    await go(page, "scaling")


async def playground(page: Page, scene: Scene) -> None:
    """Show the playground with an answer that contains a table and code."""
    await go(page, "playground")
    await page.get_by_label("Model", exact=True).select_option("writer")
    await page.locator("summary", has_text="Parameters").click()
    await page.get_by_label("Message").fill("What is a river?")
    await page.get_by_label("Message").press("Enter")
    await page.locator(".pg-answer[aria-busy=false]").wait_for(timeout=60_000)


PICTURES: Mapping[str, tuple[Callable[[Page, Scene], Awaitable[None]], str, int]] = {
    "fleet": (fleet, "light", 1080),
    "call": (call, "light", 800),
    "tenant": (tenant, "light", 1000),
    "scaling": (scaling, "light", 800),
    "playground": (playground, "dark", 800),
}
"""For each picture: the function that opens its page, the colour scheme, and the height in pixels."""


def compressed(png: bytes) -> bytes:
    """Return a picture with at most COLOURS colours."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        palette = image.convert("RGB").quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette.save(out, "png", optimize=True)
    return out.getvalue()


async def take(
    browser: Browser, checkpoint: Path, bundle: Bundle, folder: Path, names: Iterable[str] = tuple(PICTURES)
) -> None:
    """Write the pictures in `names` into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        async with console_scene(Path(scratch), browser, checkpoint, bundle) as scene:
            for name in names:
                show, scheme, height = PICTURES[name]
                async with scene.signed_in("operator", width=WIDTH, height=height, scheme=scheme) as watched:
                    await show(watched.page, scene)
                    await watched.page.wait_for_timeout(SETTLE_MS)
                    picture = await watched.page.screenshot()
                (folder / f"{name}.png").write_bytes(compressed(picture))


async def make_pictures(folder: Path) -> None:
    """Start the browser and write all pictures into a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = build_checkpoint("llama", Path(scratch))
        async with chromium() as browser:
            await take(browser, checkpoint, bundle_of(checkpoint), folder)


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures")
    folder: Path = parser.parse_args().out
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    folder.mkdir(parents=True, exist_ok=True)
    asyncio.run(make_pictures(folder))


if __name__ == "__main__":
    main()
