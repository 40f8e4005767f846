"""Progress of a run. On a terminal it is one line, redrawn a few times a second; otherwise it is printed as plain
lines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from loadtests.driver import Progress

REDRAW_S = 0.5


class Screen:
    """Output of progress and tables on the console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, markup=False, highlight=False)

    @asynccontextmanager
    async def running(self, title: str) -> AsyncIterator[Callable[[Progress], None]]:
        """Context manager for a progress line. It yields a function that shows the line; pass this function to `drive`
        as `on_start`. The line disappears at the end of the context."""
        columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[now]}"))
        with Bar(*columns, TimeElapsedColumn(), console=self.console, transient=True, auto_refresh=False) as bar:
            redraw: list[asyncio.Task[None]] = []

            def started(progress: Progress) -> None:
                task = bar.add_task(title, total=progress.total, now="")
                redraw.append(asyncio.create_task(self._follow(bar, task, progress)))

            try:
                yield started
            finally:
                for follower in redraw:
                    follower.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await follower

    async def _follow(self, bar: Bar, task: object, progress: Progress) -> None:
        before = 0
        while True:
            rate, before = (progress.pieces - before) / REDRAW_S, progress.pieces
            now = f"{progress.ended}/{progress.total} calls, {progress.running} running, {rate:.0f} pieces/s"
            if progress.failed:
                now += f", {progress.failed} failed"
            bar.update(task, completed=progress.ended, now=now)  # type: ignore[arg-type]
            bar.refresh()
            await asyncio.sleep(REDRAW_S)
