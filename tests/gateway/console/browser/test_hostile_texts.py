"""Markup and scripts in texts of callers, models and administrators stay plain text on every page of the console."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from playwright.async_api import Browser, Page, Route, expect

from cluster.api.output_parts import OutputPart, PartKind
from cluster.wire.bundle import Bundle
from tests.gateway.console.browser.payloads import HOST, PAYLOADS
from tests.support.browser import Watched, bare_page
from tests.support.cluster import until
from tests.support.console_pages import TENANT, ConsolePages, console_pages
from tests.support.echo_engine import EchoEngine
from tests.support.keyed import eventually
from tests.support.parsed_outputs import ParsedByEngine

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium"), pytest.mark.thorough]

GROUP = 12
FOREIGN = [
    *("script", "link", "meta", "base", "iframe", "frame", "object", "embed", "img", "image", "video", "audio"),
    *("source", "style", "animate", "foreignObject", "math", "template", "portal", "marquee"),
]
STRANGE = """
(foreign) => {
  const found = [];
  for (const node of document.querySelectorAll("*")) {
    const name = node.localName;
    const isOwn = ["script", "link", "meta"].includes(name) && document.head.contains(node);
    if (!isOwn && foreign.includes(name)) found.push(name);
    for (const attribute of node.getAttributeNames()) {
      const value = node.getAttribute(attribute);
      const isActive = /^(on.*|srcdoc|formaction|srcset|poster|xlink:href)$/.test(attribute);
      const loads = attribute === "style" && /url|import/i.test(value);
      const leads = /^(href|src|action)$/.test(attribute) && !/^(#|https?:|mailto:|\\/console\\/)/.test(value);
      if (isActive || loads || (leads && !isOwn)) found.push(`${name} ${attribute}=${value}`);
    }
    if (name === "a" && /^(https?|mailto):/.test(node.getAttribute("href") ?? "") && !/noopener/.test(node.rel))
      found.push(`a rel=${node.rel}`);
  }
  return found;
}
"""
"""Returns the elements and attributes that no page of the console has of its own."""


async def check(watched: Watched) -> None:
    """Check that the hostile texts have had no effect: they are shown only as text."""
    await watched.page.evaluate("new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve, 0)))")
    assert await watched.page.evaluate(STRANGE, FOREIGN) == []
    assert await watched.faults() == []


@pytest.fixture(scope="module")
async def engine(bundle: Bundle) -> EchoEngine:
    """Provide the engine behind the gateway."""
    return EchoEngine(768)


@pytest.fixture(scope="module")
async def pages(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, bundle: Bundle, engine: EchoEngine
) -> AsyncIterator[ConsolePages]:
    """Provide the console of a gateway with one worker."""
    async with console_pages(tmp_path_factory.mktemp("hostile"), browser) as running:
        await running.cluster.add_worker(engine, bundle, parser=ParsedByEngine())
        yield running
        assert await csp_reports(running) == 0


async def csp_reports(pages: ConsolePages) -> float:
    """Return the number of violations that browsers have reported to the gateway."""
    url = f"http://{pages.cluster.gateway.endpoints['metrics']}/metrics"
    text = (await asyncio.to_thread(urlopen, url)).read().decode()
    (count,) = re.findall(r"^headrace_console_csp_reports_total\S* (\S+)$", text, re.MULTILINE) or ["0"]
    return float(count)


async def test_the_checks_see_what_must_not_happen(browser: Browser, bundle: Bundle, tmp_path: Path) -> None:
    """The checks of this module detect each event that they look for: a foreign element, a request to another host, a
    call of `alert`, a violation of the policy, and the browser's report of it."""
    script = """
    (host) => {
      const image = document.body.appendChild(document.createElement("img"));
      try { image.setAttribute("onclick", "1"); } catch {}
      image.src = `${host}/x.png`;
      alert("x");
      try { document.body.innerHTML = "<b>x</b>"; } catch {}
      fetch(`${host}/x`).catch(() => {});
    }
    """
    async with console_pages(tmp_path, browser) as pages, pages.signed_in("operator") as watched:
        await watched.page.evaluate(script, HOST)
        assert {found.split(" ")[0] for found in await watched.page.evaluate(STRANGE, FOREIGN)} == {"img"}
        faults = " ".join(await watched.faults())
        assert "alert" in faults
        for directive in ("img-src", "connect-src", "require-trusted-types-for"):
            assert directive in faults

        async def is_reported() -> bool:
            return await csp_reports(pages) >= 3

        await eventually(is_reported, "the browser has reported the violations")


def test_there_are_enough_payloads() -> None:
    """There are at least 100 different payloads."""
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 100


async def test_each_payload_alone_as_markdown(browser: Browser) -> None:
    """A payload that is the whole text of an answer, and arrives in pieces, adds no foreign element and no active
    attribute to the document."""
    script = """
    async (texts) => {
      const { MarkdownView } = await import("/console/static/markdown.js");
      for (const text of texts) {
        const element = document.body.appendChild(document.createElement("div"));
        const view = new MarkdownView(element);
        for (let at = 0; at < text.length; at += 3) view.append(text.slice(at, at + 3));
        view.finish();
      }
    }
    """
    async with bare_page(browser) as watched:
        await watched.page.evaluate(script, list(PAYLOADS))
        await check(watched)


async def ask(page: Page, text: str) -> None:
    """Send a message and wait until its answer is complete."""
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(1)


async def test_prompts_answers_and_tool_calls(pages: ConsolePages, engine: EchoEngine) -> None:
    """Scripts in prompts, in answers, in reasoning, and in names and arguments of tool calls are shown as text and do
    not run."""
    groups = [PAYLOADS[at : at + GROUP] for at in range(0, len(PAYLOADS), GROUP)]
    async with pages.signed_in("caller", "playground") as watched:
        page = watched.page
        await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
        for group in groups:
            engine.parts = ()
            await ask(page, "\n\n".join(group))
            await check(watched)
            await page.get_by_role("button", name="Clear").click()
            calls = [
                [
                    OutputPart(PartKind.TOOL_NAME, text, i),
                    OutputPart(PartKind.TOOL_ARGUMENTS, json.dumps({text: text}), i),
                ]
                for i, text in enumerate(group)
            ]
            engine.parts = (OutputPart(PartKind.REASONING, "\n".join(group)), *itertools.chain(*calls))
            await ask(page, group[0])
            await expect(page.locator(".pg-tool")).to_have_count(len(group))
            assert group[0] in await page.locator(".pg-tool pre").first.inner_text() or "\\" in json.dumps(group[0])
            await check(watched)
            await page.get_by_role("button", name="Clear").click()
        engine.parts = ()


async def test_errors_of_the_api(pages: ConsolePages) -> None:
    """API errors are shown as text, even if they contain a payload that was sent as the model name."""
    async with pages.signed_in("caller", "playground") as watched:
        page = watched.page
        await expect(page.get_by_label("Model", exact=True)).to_have_value("sim")
        names = PAYLOADS[::6]
        remaining = iter(names)

        async def forge(route: Route) -> None:
            body = json.loads(route.request.post_data or "{}")
            name = next(remaining, None)
            if name is not None:
                await route.continue_(post_data=json.dumps({**body, "model": name}))
                return
            texts = [{"message": text, "code": text, "param": text} for text in PAYLOADS]
            error = {name: "\n".join(text[name] for text in texts) for name in texts[0]}
            await route.fulfill(status=418, json={"error": error}, headers={"retry-after": PAYLOADS[0]})

        await page.route("**/console/v1/chat/completions", forge)
        await page.get_by_label("Message").fill("Hello")
        await page.get_by_label("Message").press("Enter")
        problem = page.locator(".pg-answer[aria-busy=false] .problem")
        for _ in names:
            await expect(problem).to_be_visible()
            await page.get_by_role("button", name="Try again").click()
        await expect(problem).to_contain_text(PAYLOADS[-1])
        await expect(problem).to_contain_text("HTTP 418")
        await check(watched)


def texts() -> Iterator[str]:
    """Yield the payloads again and again."""
    return itertools.cycle(PAYLOADS)


def overview() -> dict[str, Any]:
    """Return an overview in which every name and every text is a payload."""
    some = texts()
    now = 1_800_000_000.0
    rows = range(len(PAYLOADS))
    models = [
        {
            "id": PAYLOADS[i], "state": next(some), "reason": next(some), "replicas": 1, "replicas_desired": 2,
            "ready_workers": 1, "running": 1, "waiting": 1, "tokens_per_s": 1.0, "ttft_p50_s": 0.1, "ttft_p99_s": 0.2,
            "cache_hit": 0.5, "aliases": [next(some)], "frozen": True,
            "versions": [
                {"version": next(some), "weight": 1, "state": next(some), "reason": next(some), "replicas": 1,
                 "replicas_desired": 1, "ready_workers": 1, "quarantined": True}
                for _ in range(2)
            ],
            "progress": {"stage": next(some), "fraction": 0.4},
        }
        for i in rows
    ]  # fmt: skip
    workers = [
        {
            "id": PAYLOADS[i], "incarnation": next(some), "model": next(some), "version": next(some),
            "state": "LOST" if i % 2 else next(some), "running": 1, "waiting": 0, "max_num_seqs": 8, "kv_usage": 0.5,
            "kv_tokens": 100, "step_ms": 3.0, "node": next(some), "host": next(some), "pod": next(some),
            "gpu": next(some), "ray_cluster": next(some), "links": [next(some)], "lost_at": now if i % 2 else None,
            "lost_reason": next(some), "resumed": 1,
        }
        for i in rows
    ]  # fmt: skip
    calls = [
        {
            "id": PAYLOADS[i], "request_id": next(some), "tenant": next(some), "model": next(some), "api": next(some),
            "state": "ended" if i % 2 else "running", "outcome": next(some), "arrived_s": now, "queue_s": 0.1,
            "ttft_s": 0.1, "tokens": 5, "tokens_per_s": 1.0, "prompt_tokens": 3, "cached_tokens": 1,
            "worker": next(some), "gateway": next(some), "reason": next(some), "resumes": 1, "trace_id": next(some),
            "duration_s": 1.0,
        }
        for i in rows
    ]  # fmt: skip
    tenants = [
        {
            "id": PAYLOADS[i], "weight": 1.0, "running": 1, "waiting": 0, "tokens_per_s": 1.0, "share": 0.1,
            "fair_share": 0.1, "gap": 0.0, "requests": 1, "cost_per_h": 0.1,
            "limits": {next(some): {"used": 1, "limit": 2}}, "budget": {"used": 1, "limit": 2, "currency": next(some)},
        }
        for i in rows
    ]  # fmt: skip
    scaling = [{"id": PAYLOADS[i], "wanted": 1, "had": 1, "reason": next(some), "frozen": True} for i in rows]
    gateways = [
        {"id": PAYLOADS[i], "age_s": 0.1, "streams": 1, "queued": 0, "lag_ms": 1.0, "tokens_per_s": 1.0, "process": 0}
        for i in rows
    ]
    return {
        "at": now, "cluster": next(some), "version": next(some), "step_s": 1.0, "controller": {"age_s": 0.4},
        "gateways": gateways, "models": models, "workers": workers, "calls": calls, "tenants": tenants,
        "scaling": scaling,
    }  # fmt: skip


async def test_names_and_reasons_in_the_overview(pages: ConsolePages) -> None:
    """Hostile names of models, workers, nodes, tenants, calls and gateways are shown as text, and so are hostile
    reasons."""
    event = f"event: state\ndata: {json.dumps(overview())}\n\n"

    async with pages.signed_in("operator") as watched:
        page = watched.page

        async def forge(route: Route) -> None:
            await route.fulfill(body=event, content_type="text/event-stream", headers={"cache-control": "no-store"})

        await page.route("**/console/events", forge)
        await page.reload()
        await expect(page.locator("main")).to_contain_text(PAYLOADS[0])
        for name in ("fleet", "calls", "tenants", "scaling"):
            await page.evaluate("(name) => { location.hash = `#/${name}`; }", name)
            await expect(page.locator(f".page-{name}")).to_contain_text(PAYLOADS[0])
            await check(watched)
        for payload in PAYLOADS[::20]:
            for name in ("calls", "tenants"):
                await page.evaluate(
                    "([name, id]) => { location.hash = `#/${name}/${encodeURIComponent(id)}`; }", [name, payload]
                )
                await page.wait_for_selector(f".page-{name} h1")
                await check(watched)


async def test_texts_of_the_ledger(pages: ConsolePages) -> None:
    """Markup and scripts in the descriptions of a tenant's keys are shown as plain text, also in the audit log."""
    ledger = pages.keyed.ledger

    def fill() -> None:
        for text in filter(str.isprintable, PAYLOADS):  # the ledger refuses all other names
            ledger.keys.create(TENANT, text)

    await asyncio.to_thread(fill)
    async with pages.signed_in("tenant_admin", "tenants") as watched:
        page = watched.page
        await expect(page.locator("main")).to_contain_text(PAYLOADS[0])
        await check(watched)


async def test_answers_of_the_admin_api(pages: ConsolePages) -> None:
    """Payloads in all texts of the admin API's answers, and in its errors, are shown as text."""
    some = texts()

    def forged(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: forged(item) for key, item in value.items()}
        if isinstance(value, list):
            return [forged(item) for item in value]
        return next(some) if isinstance(value, str) and not value.replace(".", "").isdigit() else value

    begun = ended = 0
    is_refused = False

    async def forge(route: Route) -> None:
        nonlocal begun, ended
        begun += 1
        if is_refused:
            error = {"code": next(some), "message": next(some), "field": next(some)}
            await route.fulfill(status=400, json={"error": error})
        else:
            answer = await route.fetch()
            await route.fulfill(status=answer.status, json=forged(await answer.json()))
        ended += 1

    async with pages.signed_in("operator") as watched:
        page = watched.page
        await page.route("**/console/api/**", forge)
        for round_number in range(2):
            is_refused = round_number == 1
            for name in ("tenants", f"tenants/{TENANT}", "scaling", "calls", "fleet"):
                await page.evaluate("(name) => { location.hash = `#/${name}`; }", name)
                await page.wait_for_selector(f".page-{name.split('/')[0]} h1")
                await until(lambda: begun == ended, "all requests are answered")
                await check(watched)
    assert ended > 8
