"""The worker's side of the renderer's process: every chat is answered, even after the process has died or hung."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cluster.api.types import EngineInfo, ModelSpec
from cluster.worker.parsing import wire
from cluster.worker.parsing.hangs import HangWatch, cpu_seconds
from cluster.worker.parsing.model_parser import model_renderer, with_parsers
from cluster.worker.parsing.parser_process import ParserHost
from cluster.worker.rendering.kit import RendererKit
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.rendered_models import build_rendered
from tests.support.rendering import ByteKit
from tests.worker.parsing.hosts import fork_host, thread_host

HANG, DIE, RAISE = "please hang", "please die", "please raise"
MOST = 10_000
INFO = EngineInfo("sim", "sim", "1", 16, 100, 8, 64, 4096, 768)


def watch(host: ParserHost) -> HangWatch:
    """Return a watch that reports a process as hung after 0.3 s of CPU time."""
    return HangWatch(host.progress.read, lambda: cpu_seconds(host.pid), 0.3, 60.0)


class FaultyKit(ByteKit):
    """A renderer kit that fails on a chat that contains one of the words HANG, DIE or RAISE."""

    def render(self, request: wire.Render) -> wire.Rendered:
        """Render a chat, unless it contains one of three words. With HANG the method hangs, with DIE it ends the
        process, and with RAISE it raises an error."""
        while HANG.encode() in request.chat:
            pass
        if DIE.encode() in request.chat:
            os._exit(9)
        if RAISE.encode() in request.chat:
            raise MemoryError
        return super().render(request)


def open_kit(kind: type[ByteKit] = ByteKit) -> ByteKit:
    """Return a kit that renders at once."""
    kit = kind()
    kit.open.set()
    return kit


def chat(text: str) -> bytes:
    """Return a chat with one message."""
    return json.dumps({"messages": [{"role": "user", "content": text}]}).encode()


@contextlib.asynccontextmanager
async def running(
    start: Callable[[], ParserHost], watch: Callable[[ParserHost], HangWatch] = HangWatch.of
) -> AsyncIterator[PromptRenderer]:
    """Run a renderer in the background."""
    renderer = PromptRenderer("deepseek_v32", start, watch)
    task = asyncio.create_task(renderer.run())
    try:
        async with asyncio.timeout(60):
            yield renderer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_chats_are_answered_in_any_number() -> None:
    """Each of many chats gets its own prompt, even a chat that arrives before the process is ready."""
    async with running(lambda: thread_host(open_kit())) as renderer:
        texts = [f"text {i}" for i in range(20)]
        answers = await asyncio.gather(*(renderer.render(chat(text), MOST) for text in texts))
        assert renderer.waiting == 0
    assert [bytes(wire.unpack_ids(answer.ids)) for answer in answers] == [chat(text) for text in texts]


@pytest.mark.slow
async def test_only_the_faulty_chat_fails() -> None:
    """A chat on which the process dies, hangs or raises an error fails with an error for the field `messages`. All
    other chats are answered. A chat that was cancelled earlier does not change this."""
    kit = open_kit(FaultyKit)
    async with running(lambda: fork_host(kit), watch) as renderer:
        texts = ["a", DIE, "b", HANG, "c", RAISE, "d"]
        withdrawn = asyncio.ensure_future(renderer.render(chat("withdrawn"), MOST))
        await asyncio.sleep(0)
        withdrawn.cancel()
        answers = await asyncio.gather(*(renderer.render(chat(text), MOST) for text in texts))
        assert renderer.replaced == 3, "two for the chat that ends processes, one for the chat that hangs"
        assert renderer.waiting == 0
    for text, answer in zip(texts, answers, strict=True):
        assert bool(answer.error) == (text in (DIE, HANG, RAISE)), text
        assert answer.field == ("messages" if answer.error else "")
        assert bool(answer.ids) != bool(answer.error)


async def test_a_process_that_does_not_start_answers() -> None:
    """If the renderer cannot be loaded, each chat fails at once. The error has the reason and names no field."""

    def load() -> RendererKit:
        raise ValueError("no such tokenizer")

    async with running(lambda: thread_host(load)) as renderer:
        answer = await renderer.render(chat("a"), MOST)
    assert "no such tokenizer" in answer.error
    assert answer.field == ""


@pytest.mark.engine
@pytest.mark.slow
def test_a_real_process_renders(tmp_path: Path) -> None:
    """A worker's capabilities contain the name of its model's renderer. A separate process of the renderer makes a
    prompt of a chat."""
    folder = build_rendered("deepseek_v32", tmp_path)
    spec = ModelSpec(name="m", source=f"file://{folder}")
    renderer = model_renderer(spec, folder, build_bundle(folder))
    assert renderer is not None
    assert with_parsers(INFO, None, renderer).capabilities == ("renders:deepseek_v32",)

    async def render() -> wire.Rendered:
        task = asyncio.create_task(renderer.run())
        try:
            async with asyncio.timeout(120):
                return await renderer.render(chat("hello"), MOST)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    assert asyncio.run(render()).tokens > 3
