"""The tokenizers and chat templates of all models. They come from tokenizer bundles and are keyed by the digest of the
bundle."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.tokenizer import TextModel
from cluster.process import memory
from cluster.wire.bundle import Bundle

log = structlog.get_logger("directory")


class TextModels:
    """The tokenizers and chat templates (TextModel) of one gateway. A bundle is read from disk; a missing bundle is
    fetched and written to disk."""

    def __init__(self, folder: Path, fetch: Callable[[str], Awaitable[Bundle]]) -> None:
        """`folder`: the gateway's folder. `fetch` returns a bundle by its digest, or raises LookupError."""
        self._folder = folder / "bundles"
        self._fetch = fetch
        self._tasks: dict[str, asyncio.Task[TextModel]] = {}
        self._prompts = PromptMemory()

    async def get(self, digest: str) -> TextModel:
        """Return the TextModel of a bundle. Raises LookupError if the bundle cannot be fetched."""
        task = self._tasks.get(digest)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._tasks[digest] = asyncio.create_task(self._load(digest))
        return await asyncio.shield(task)

    def prefetch(self, digest: str) -> None:
        """Begin to load a TextModel before the first call needs it. Does nothing if a load was begun before."""
        if digest not in self._tasks:
            task = self._tasks[digest] = asyncio.create_task(self._load(digest))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def _load(self, digest: str) -> TextModel:
        folder = self._folder / digest.replace(":", "-")
        if folder.exists():
            bundle = await asyncio.to_thread(Bundle.load, folder)
            if bundle.digest == digest:
                return await self._text_model(bundle)
            log.warning("bundle.damaged", folder=str(folder))
        bundle = await self._fetch(digest)
        text = await self._text_model(bundle)
        await asyncio.to_thread(bundle.save, folder)
        return text

    async def _text_model(self, bundle: Bundle) -> TextModel:
        text = await asyncio.to_thread(TextModel.from_bundle, bundle, memory=self._prompts)
        memory.freeze_objects()
        return text
