"""The part `hostile` of the console's load test: it puts scripts into every text that the pages show, and
counts their effects.

The scripts take the place of names, reasons, errors and texts in the overview, in the admin API's answers
and in a model's answers. Each of these effects counts: a foreign element, an active attribute, a script
that runs, a request to another host, a dialog, or a report of the content security policy.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Mapping

from playwright.async_api import Browser, Route, expect

from cluster.api.output_parts import OutputPart, PartKind
from loadtests.console.browsers import chromium
from loadtests.console.cluster import filled
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from tests.gateway.console.browser.payloads import PAYLOADS
from tests.gateway.console.browser.test_hostile_texts import FOREIGN, GROUP, STRANGE, ask, overview
from tests.support.browser import Watched, bare_page
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of
from tests.support.console_pages import console_pages
from tests.support.echo_engine import EchoEngine
from tests.support.parsed_outputs import ParsedByEngine

ROW = f"XSS: effects of {len(PAYLOADS)} payloads in model output, names, prompts, tool arguments and errors"
LIVE = "pages on which the payloads were shown"
ROWS: Mapping[str, Bound | None] = {ROW: Bound("<=", 0), LIVE: None}
PAGES = ("fleet", "calls", "tenants", "scaling")
LATEST_MS = 60_000
MARKDOWN = """
async (texts) => {
  const { MarkdownView } = await import("/console/static/markdown.js");
  for (const text of texts) {
    const view = new MarkdownView(document.body.appendChild(document.createElement("div")));
    for (let at = 0; at < text.length; at += 3) view.append(text.slice(at, at + 3));
    view.finish();
  }
}
"""


async def measure(stage: Stage) -> list[Figure]:
    """Put hostile scripts into the texts that the console's pages show, and return the report's rows. Raises
    RuntimeError."""
    effects: list[str] = []
    looked = 0
    async with chromium() as browser, filled(stage, browser) as pages:
        async with bare_page(browser) as watched:
            await watched.page.evaluate(MARKDOWN, list(PAYLOADS))
            effects += await effects_in(watched)
            looked += 1
        event = f"event: state\ndata: {json.dumps(overview())}\n\n"

        async def forge(route: Route) -> None:
            await route.fulfill(body=event, content_type="text/event-stream")

        async def refuse(route: Route) -> None:
            error = {"code": PAYLOADS[0], "message": "\n".join(PAYLOADS), "field": PAYLOADS[1]}
            await route.fulfill(status=400, json={"error": error})

        async with pages.console.signed_in("operator") as watched:
            page = watched.page
            await page.route("**/console/events", forge)
            await page.route("**/console/api/**", refuse)
            await page.reload()
            for name in PAGES:
                stage.screen.say(f"payloads on the page {name}")
                await page.evaluate("(name) => { location.hash = `#/${name}`; }", name)
                await page.wait_for_function(
                    "([name, text]) => document.querySelector(`.page-${name}`)?.textContent.includes(text)",
                    arg=[name, PAYLOADS[0]], timeout=LATEST_MS,
                )  # fmt: skip
                effects += [f"{name}: {each}" for each in await effects_in(watched)]
                looked += 1
            for payload in PAYLOADS:
                await page.evaluate("(id) => { location.hash = `#/calls/${encodeURIComponent(id)}`; }", payload)
                await page.wait_for_selector(".page-calls h1")
            effects += await effects_in(watched)
            looked += len(PAYLOADS)
        chat_effects, chats = await _chats(stage, browser)
        effects, looked = [*effects, *chat_effects], looked + chats
    stage.report.settings["effects of payloads"] = effects
    note = effects[0][:160] if effects else "none, and no report of the policy"
    return [exact(ROW, len(effects), ROWS[ROW], "effects", note), exact(LIVE, looked, None, "pages")]


async def _chats(stage: Stage, browser: Browser) -> tuple[list[str], int]:
    """Send hostile scripts as prompts to a model that repeats its prompt, first as text, then as reasoning and tool
    calls. Return the effects of the scripts on the console's page, and the number of answers that were shown."""
    folder = stage.folder / "echo"
    checkpoint = await asyncio.to_thread(build_checkpoint, "llama", folder / "checkpoint")
    bundle, engine = bundle_of(checkpoint), EchoEngine(768)
    found: list[str] = []
    looked = 0
    async with console_pages(folder / "gateway", browser) as console:
        await console.cluster.add_worker(engine, bundle, parser=ParsedByEngine())
        async with console.signed_in("caller", "playground") as watched:
            page = watched.page
            await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
            for at in range(0, len(PAYLOADS), GROUP):
                group = PAYLOADS[at : at + GROUP]
                calls = [
                    [
                        OutputPart(PartKind.TOOL_NAME, text, i),
                        OutputPart(PartKind.TOOL_ARGUMENTS, json.dumps([text]), i),
                    ]
                    for i, text in enumerate(group)
                ]
                parsed = (OutputPart(PartKind.REASONING, "\n".join(group)), *itertools.chain(*calls))
                for parts in ((), parsed):
                    engine.parts = parts
                    await ask(page, "\n\n".join(group))
                    found += [f"playground: {each}" for each in await effects_in(watched)]
                    looked += 1
                    await page.get_by_role("button", name="Clear").click()
    return found, looked


async def effects_in(watched: Watched) -> list[str]:
    """Return the effects that hostile texts have had on a page: elements that belong to no page of the console, and
    faults that the browser recorded."""
    await watched.page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)))")
    strange: list[str] = await watched.page.evaluate(STRANGE, FOREIGN)
    return [*strange, *await watched.faults()]
