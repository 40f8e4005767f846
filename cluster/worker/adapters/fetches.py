"""The threads that fetch a worker's adapters, and the end of the wait for a source that does not answer.

A thread cannot be ended from outside. So a fetch without progress is abandoned: the adapter fails, and the next fetch
runs in another thread. Nothing is fetched again from a source while an abandoned fetch of it hangs, and while
MAX_ABANDONED fetches hang, nothing new is fetched.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from cluster.api.adapters import AdapterSpec
from cluster.worker.adapters.port import AdapterFiles
from cluster.worker.weights.adapter_store import StoredAdapter

PARALLEL_FETCHES: Final = 2
"""Maximum number of fetches at a time, without the abandoned ones."""
MAX_ABANDONED: Final = 8
"""Number of abandoned fetches that hang at which nothing new is fetched."""
SILENCE_S: Final = 600.0
"""Seconds without progress after which a fetch is abandoned. A check of the files must end within this time too."""


class AdapterFetches:
    """The fetches of one worker's adapters."""

    def __init__(self, files: AdapterFiles, silence_s: float = SILENCE_S) -> None:
        """`silence_s`: seconds without progress after which a fetch is abandoned."""
        self._files = files
        self._silence_s = silence_s
        # Fetches that hang must not occupy the event loop's own threads.
        self._threads = ThreadPoolExecutor(PARALLEL_FETCHES + MAX_ABANDONED, thread_name_prefix="adapter-fetch")
        self._slots = asyncio.Semaphore(PARALLEL_FETCHES)
        self._running: set[asyncio.Task[StoredAdapter]] = set()
        self._abandoned: dict[Future[StoredAdapter], str] = {}
        """The abandoned fetches that still hang, with their sources."""

    async def fetch(self, spec: AdapterSpec) -> StoredAdapter:
        """Fetch and check an adapter. If the caller is cancelled, a fetch that has begun goes on. Raises ValueError,
        OSError, and what a source's library raises."""
        await self._slots.acquire()
        task = asyncio.create_task(self._run(spec))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the waits for all fetches, without waiting for their threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, spec: AdapterSpec) -> StoredAdapter:
        try:
            self._check_abandoned(spec.source)
            progress = _Progress()
            fetch = self._threads.submit(self._files.fetch, spec, progress.mark)
            done = asyncio.wrap_future(fetch)
            done.add_done_callback(
                lambda ended: ended.cancelled() or ended.exception()
            )  # read, so that it is not logged
            while (left_s := progress.at + self._silence_s - time.monotonic()) > 0:
                if (await asyncio.wait((done,), timeout=left_s))[0]:
                    return await done
            self._abandoned[fetch] = spec.source
            raise ValueError(f"the source did not answer within {self._silence_s:.0f} s")
        finally:
            self._slots.release()

    def _check_abandoned(self, source: str) -> None:
        """Raise ValueError if too many fetches hang, or one of this source."""
        self._abandoned = {fetch: place for fetch, place in self._abandoned.items() if not fetch.done()}
        if source in self._abandoned.values():
            raise ValueError(f"the source did not answer within {self._silence_s:.0f} s, and that fetch still hangs")
        if len(self._abandoned) >= MAX_ABANDONED:
            raise ValueError(f"{len(self._abandoned)} fetches of other adapters hang: mend or unload those first")


class _Progress:
    """Time of the last progress of a fetch. One thread writes, the event loop reads."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def mark(self) -> None:
        """Record progress."""
        self.at = time.monotonic()
