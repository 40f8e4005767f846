"""The playground in a browser, at a gateway whose engine answers with the prompt."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from cluster.api.output_parts import OutputPart, PartKind
from cluster.wire.bundle import Bundle
from tests.support.browser import Watched
from tests.support.cluster import until
from tests.support.console_pages import ConsolePages, console_pages
from tests.support.echo_engine import EchoEngine
from tests.support.parsed_outputs import ParsedByEngine

pytestmark = [pytest.mark.slow, pytest.mark.needs("chromium")]

TOOLS = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'


@pytest.fixture(scope="module")
async def engine(bundle: Bundle) -> EchoEngine:
    """Provide the engine behind the gateway."""
    return EchoEngine(768, step_s=0.005, tokens_a_step=2)


@pytest.fixture(scope="module")
async def pages(
    tmp_path_factory: pytest.TempPathFactory, browser: Browser, bundle: Bundle, engine: EchoEngine
) -> AsyncIterator[ConsolePages]:
    """Provide the console of a gateway with one worker."""
    async with console_pages(tmp_path_factory.mktemp("playground"), browser) as running:
        await running.cluster.add_worker(engine, bundle, parser=ParsedByEngine())
        yield running


@pytest.fixture
async def watched(pages: ConsolePages, engine: EchoEngine) -> AsyncIterator[Watched]:
    """Provide the playground of a tenant's caller."""
    engine.parts = ()
    async with pages.signed_in("caller", "playground") as opened:
        await expect(opened.page.get_by_label("Model", exact=True)).to_have_value("sim")
        yield opened
        assert await opened.faults() == []


async def ask(page: Page, text: str) -> None:
    """Send a message and wait until its answer is complete."""
    answers = await page.locator(".pg-answer").count()
    await page.get_by_label("Message").fill(text)
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(answers + 1)


async def open_group(page: Page, name: str) -> None:
    """Open a group of the settings."""
    await page.locator("summary", has_text=name).click()


async def test_an_answer_is_shown_as_markdown_with_its_counts(watched: Watched) -> None:
    """An answer appears as Markdown with the time to its first token, its rate and its tokens. The conversation can be
    cleared."""
    page = watched.page
    await ask(page, "Hello\n\n# A title\n\n- **one**\n\n```js\nlet a;\n```\n\n<b>bold</b>")
    answer = page.locator(".pg-answer")
    await expect(answer.locator("h3")).to_have_text("A title")
    await expect(answer.locator("li strong")).to_have_text("one")
    await expect(answer.locator("pre code")).to_have_text("let a;")
    assert "<b>bold</b>" in await answer.inner_text()
    facts = await answer.locator(".pg-facts").inner_text()
    assert re.search(r"first token after [\d.,]+ m?s", facts)
    assert re.search(r"\d tokens", facts)
    await ask(page, "And again?")
    await expect(page.locator(".pg-question")).to_have_count(2)
    assert "A title" in await page.locator(".pg-answer").nth(1).inner_text(), (
        "the conversation is sent with each question"
    )
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator(".pg-message")).to_have_count(0)


async def test_an_answer_can_be_stopped_and_asked_for_again(watched: Watched, pages: ConsolePages) -> None:
    """The button Stop ends the call at the gateway and keeps the text so far. The button Try again replaces the
    answer."""
    page = watched.page
    await page.get_by_label("Message").fill("word " * 300)
    await page.get_by_label("Message").press("Enter")
    await expect(page.locator(".pg-answer .md")).to_contain_text("word word")
    await page.get_by_role("button", name="Stop").click()
    await expect(page.locator(".pg-facts")).to_contain_text("stopped by you")
    await pages.cluster.until_idle()
    stopped = len(await page.locator(".pg-answer .md").inner_text())
    assert 0 < stopped < 1400
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".pg-answer[aria-busy=false]")).to_have_count(1)
    await expect(page.locator(".pg-answer .md")).to_contain_text("word word")


async def test_tool_calls_are_shown_and_answered(watched: Watched, engine: EchoEngine) -> None:
    """Reasoning is folded, and tool calls show their arguments. A result that a person types is sent to the model."""
    page = watched.page
    await open_group(page, "Tools")
    await page.get_by_label("Tools as JSON").fill(TOOLS)
    engine.parts = (
        OutputPart(PartKind.REASONING, "The city is asked for."),
        OutputPart(PartKind.TOOL_NAME, "weather", 0),
        OutputPart(PartKind.TOOL_ARGUMENTS, '{"city": "Bern"}', 0),
    )
    await ask(page, "Weather in Bern?")
    await expect(page.locator(".pg-reasoning .pg-text")).to_be_hidden()
    await page.locator(".pg-reasoning summary").click()
    await expect(page.locator(".pg-reasoning .pg-text")).to_have_text("The city is asked for.")
    await expect(page.locator(".pg-tool pre")).to_have_text('{\n  "city": "Bern"\n}')
    engine.parts = (OutputPart(PartKind.CONTENT, "It is *sunny*."),)
    await page.get_by_label("Result of weather").fill("sunny")
    await page.get_by_role("button", name="Send the results").click()
    await expect(page.locator(".pg-answer em")).to_have_text("sunny")
    await open_group(page, "This request as code")
    await expect(page.locator(".pg-settings pre")).to_contain_text('"role": "tool"')
    await expect(page.locator(".pg-settings pre")).to_contain_text('"content": "sunny"')


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("Parameters", "Temperature", "7", "temperature"),
        ("Parameters", "Seed", "many", "enter a number"),
        ("Tools", "Tools as JSON", "[{", "this is not JSON"),
        ("Tools", "Tools as JSON", '[{"name": "a b"}]', "tools[0]"),
        ("JSON schema", "Schema of the answer", "[]", "enter a JSON object"),
    ],
)
async def test_a_wrong_setting_is_named(watched: Watched, group: str, field: str, value: str, message: str) -> None:
    """A setting that cannot be sent is named in the form. For any other wrong setting, the gateway's message is
    shown."""
    page = watched.page
    await open_group(page, group)
    await page.get_by_label(field).fill(value)
    await page.get_by_label("Message").fill("Hello")
    await page.get_by_label("Message").press("Enter")
    problem = page.locator(".problem:visible")
    await expect(problem).to_contain_text(message)


async def test_parameters_reach_the_gateway(watched: Watched) -> None:
    """The request has every setting that has a value, and no empty setting."""
    page = watched.page
    await open_group(page, "Parameters")
    for label, value in (("Temperature", "0.5"), ("Top p", "0.9"), ("Max tokens", "5"), ("Seed", "7")):
        await page.get_by_label(label).fill(value)
    await page.get_by_label("Stop strings").fill("END\nSTOP")
    await page.get_by_label("Reasoning effort").select_option("low")
    await page.get_by_label("System prompt").fill("Be brief.")
    async with page.expect_request("**/chat/completions") as sent:
        await ask(page, "Hello")
    body = (await sent.value).post_data_json
    assert body == {
        "model": "sim",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 5,
        "seed": 7,
        "stop": ["END", "STOP"],
        "reasoning_effort": "low",
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    await page.get_by_label("Streaming").select_option("no")
    await ask(page, "Hello again")
    await expect(page.locator(".pg-answer").nth(1).locator(".md")).to_contain_text("again")


async def test_the_code_makes_the_same_request(watched: Watched, pages: ConsolePages, tmp_path: Path) -> None:
    """The copied curl command and Python program get an answer when they are run with a key. The copied text contains
    no key."""
    page = watched.page
    await page.get_by_label("Message").fill('It\'s "quoted" $HOME `x` \\ \u00e9 \u2028 end')
    await open_group(page, "This request as code")
    block, key = page.locator(".pg-settings pre"), pages.keys["caller"]
    await expect(block).to_contain_text("curl")
    shown = {"curl": await block.inner_text()}
    await page.locator(".pg-settings").get_by_role("button", name="Python").click()
    shown["Python"] = await block.inner_text()
    assert all("HEADRACE_API_KEY" in text and key not in text and "$HOME" in text for text in shown.values())
    program = tmp_path / "program.py"
    program.write_text(shown["Python"])
    environment = {"PATH": "/usr/bin:/bin", "HEADRACE_API_KEY": key}
    for command in (["bash", "-c", shown["curl"]], [sys.executable, str(program)]):
        done = await asyncio.to_thread(
            subprocess.run, command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        output = done.stdout
        if command[0] == "bash":
            events = [json.loads(line[6:]) for line in output.splitlines() if line.startswith("data: {")]
            output = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
        assert 'It\'s "quoted" $HOME `x` \\ \u00e9 \u2028 end' in output


async def test_the_conversation_stays_while_other_pages_are_looked_at(watched: Watched, pages: ConsolePages) -> None:
    """A conversation continues while the person is on another page. It is not in the browser's storage and is gone
    after a reload."""
    page = watched.page
    await page.get_by_label("Message").fill("number " * 250)
    await page.get_by_label("Message").press("Enter")
    await page.evaluate("location.hash = '#/calls'")
    await expect(page.locator("h1")).to_have_text("Calls")
    await pages.cluster.until_idle()
    await page.evaluate("location.hash = '#/playground'")
    await expect(page.locator(".pg-answer[aria-busy=false] .md")).to_contain_text("number number")
    stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    kept = await page.evaluate(stored)
    assert "number" not in kept
    assert "hr_" not in kept
    await page.reload()
    await expect(page.locator("h1")).to_have_text("Playground")
    await expect(page.locator(".pg-message")).to_have_count(0)


async def test_a_refusal_by_a_limit_says_when_to_try_again(pages: ConsolePages) -> None:
    """If a tenant's limit refuses a question, the page shows the API's message, code and retry time."""
    keyed = pages.keyed
    key = await keyed.key("small", limits={"requests_per_minute": 1})
    pages.keys["small"] = key
    async with pages.signed_in("small", "playground") as watched:
        page = watched.page
        await ask(page, "Hello")
        await page.get_by_label("Message").fill("Hello again")
        await page.get_by_label("Message").press("Enter")
        await expect(page.locator(".problem:visible")).to_contain_text("HTTP 429")
        await expect(page.locator(".problem:visible")).to_contain_text("try again in")
    await until(lambda: pages.cluster.idle, "all calls have ended")
