"""The demo works for a new user, with the real model on the real engine under Ray, from the SDK and the CLI."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.cli.local.run_folder import RunFolder
from cluster.client import Client
from cluster.config.paths import cache_dir
from cluster.ray import reaper
from tests.support.shell import headrace, status, until

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.thorough]

DEMO = Path(__file__).parents[3] / "deploy" / "demo.yaml"
QUESTION = "What is the capital of France?"
STORY = "Write a long story about a river that finds its way from the mountains to the sea."
ENGINE = "VLLM::EngineCore"
RESTART_S = 400
"""Seconds within which Ray starts another replica, on a busy machine too."""


@dataclass
class Demo:
    """A process `up --demo` that runs in the foreground, with the lines that it has printed."""

    process: subprocess.Popen[str]
    lines: list[str]
    run: RunFolder

    @property
    def grpc(self) -> str:
        """The gRPC endpoint of the demo's gateway."""
        return str(self.run.endpoints()["grpc"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The running demo, with free ports and a temporary run folder. The converted weights stay in the user's cache."""
    folder = tmp_path_factory.mktemp("demo")
    weights = cache_dir() / "models"
    weights.mkdir(parents=True, exist_ok=True)
    listen = ", ".join(f"{port}: '127.0.0.1:0'" for port in ("grpc", "http", "link", "admin", "metrics"))
    # The only replica is killed by a test, and a call waits until Ray has started another one.
    settings = f"gateway: {{listen: {{{listen}}}, resume: {{max_wait_s: {RESTART_S}}}}}\n"
    text = DEMO.read_text().replace("name: demo\n", f"name: demotest\n{settings}", 1)
    file = folder / "demo.yaml"
    file.write_text(text)
    cache = folder / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(weights)
    before = os.environ.get("HEADRACE_CACHE_DIR")
    os.environ["HEADRACE_CACHE_DIR"] = str(cache)
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli.main", "up", "-f", str(file), "--demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("Ctrl-C"):
                break
        yield Demo(process, lines, RunFolder("demotest"))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(240)
        if before is None:
            del os.environ["HEADRACE_CACHE_DIR"]
        else:
            os.environ["HEADRACE_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def cache() -> None:
    """Override the fixture that gives each test a new cache folder. All tests of this module use one cache folder."""


def test_it_gets_ready_and_names_paris(demo: Demo) -> None:
    """The demo prints a line that begins with `ready`, and an answer that contains Paris.

    The SDK gets the same text from the demo as a whole answer and as a stream.
    """
    assert any(line.startswith("ready") for line in demo.lines), "\n".join(demo.lines)
    assert any("Paris" in line for line in demo.lines), "\n".join(demo.lines)
    with Client(demo.grpc) as client:
        answer = client.chat("default", QUESTION, temperature=0.0, max_tokens=30)
        streamed = "".join(client.stream_chat("default", QUESTION, temperature=0.0, max_tokens=30))
    assert "Paris" in answer.text
    assert streamed == answer.text
    assert answer.model == "smollm2-135m-instruct"
    assert answer.usage.completion_tokens > 0


def test_status_and_chat(demo: Demo) -> None:
    """`status --json` shows that the model is READY and its engine uses the fast path, and `chat` prints an answer."""
    shown = status()
    assert [(m["name"], m["state"]) for m in shown["models"]] == [("smollm2-135m-instruct", "READY")]
    assert shown["workers"][0]["engine_path"] == "fastpath", shown["workers"]
    answer = headrace("chat", "default", QUESTION, "--temperature", "0")
    assert answer.returncode == 0, answer.stderr
    assert "Paris" in answer.stdout


def test_a_cancel_reaches_the_real_engine(demo: Demo) -> None:
    """The engine stops running a call soon after the client has cancelled the stream."""

    def running() -> int:
        return int(status()["workers"][0]["running"])

    with Client(demo.grpc) as client:
        stream = client.stream_chat("default", "Count to a million.", max_tokens=1900, ignore_eos=True)
        next(stream.chunks())
        until(lambda: running() == 1, "the engine runs the call")
        stream.cancel()
        until(lambda: running() == 0, "the engine has dropped the call")


@pytest.mark.needs("chromium")
@pytest.mark.long
async def test_a_chat_in_the_console_survives_its_worker(demo: Demo, tmp_path: Path) -> None:
    """The demo prints the console's address, and the console's fleet page shows a lost worker.

    A chat in the console's playground continues after its worker was killed, with the text of an undisturbed chat.
    """
    from playwright.async_api import expect

    from tests.support.browser import chromium, watched_page

    (address,) = (line.split()[-1] for line in demo.lines if line.strip().startswith("console"))
    origin = f"http://{demo.run.endpoints()['http']}"
    assert address == f"{origin}/".replace("127.0.0.1", "localhost")
    async with chromium() as browser, watched_page(browser, origin) as chat, watched_page(browser, origin) as fleet:
        page, longest_ms = chat.page, RESTART_S * 1000
        await fleet.page.goto(f"{origin}/#/fleet")
        await page.goto(f"{origin}/#/playground")
        await page.locator("summary", has_text="Parameters").click()
        await page.get_by_label("Temperature").fill("0")
        await page.get_by_label("Max tokens").fill("120")
        await expect(page.get_by_label("Model", exact=True)).not_to_have_value("")
        await page.get_by_label("Message").fill(STORY)
        await page.get_by_label("Message").press("Enter")
        answer, ended = page.locator(".pg-answer .md"), page.locator(".pg-answer[aria-busy=false]")
        await expect(ended).to_have_count(1, timeout=longest_ms)
        whole = await answer.inner_text()
        await page.get_by_role("button", name="Try again").click()
        await expect(page.locator(".pg-answer .pg-facts")).to_contain_text(re.compile("about [2-9][0-9] tokens"))
        (engine,) = (
            pid for pid in reaper.find(demo.run.instance()) if ENGINE in " ".join(psutil.Process(pid).cmdline())
        )
        os.kill(engine, signal.SIGKILL)
        lost = fleet.page.locator("tr.lost")
        await expect(lost).to_be_visible(timeout=longest_ms)
        await fleet.page.screenshot(path=tmp_path / "fleet.png")
        await expect(ended).to_have_count(1, timeout=longest_ms)
        await page.screenshot(path=tmp_path / "playground.png")
        assert await page.locator(".pg-answer .problem:visible").count() == 0
        assert await answer.inner_text() == whole
        await expect(page.locator(".pg-resumes")).to_contain_text("Resumed on another worker")
        assert [*await chat.faults(), *await fleet.faults()] == []


def test_interrupt_leaves_nothing(demo: Demo) -> None:
    """Ctrl-C (SIGINT) ends every process that the demo has started."""
    instance = demo.run.instance()
    assert len(reaper.find(instance)) >= 4
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(240) == 0
    leftovers = [psutil.Process(pid).cmdline() for pid in reaper.find(instance)]
    assert not leftovers
