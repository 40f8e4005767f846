"""Ray of a local cluster: start, stop, and replacement of a Ray that has ended."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path

from cluster.cli.local.children import StartFailed
from cluster.ray import reaper
from cluster.ray.local_cluster import LocalRay, LocalRaySettings, RayDidNotStart

POLL_S = 0.1
WATCH_S = 0.5


class RayProcess:
    """The Ray that a local cluster currently uses. Blocking methods of LocalRay are called in a thread."""

    def __init__(self, settings: LocalRaySettings) -> None:
        self._settings = settings
        self._ray = LocalRay(settings)
        self._up = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id of Ray, or None while Ray does not run."""
        return self._ray.pid

    @property
    def folder(self) -> Path:
        """Folder of Ray's session, which contains the replicas' logs."""
        return self._ray.folder

    def log_tail(self) -> str:
        """Return the last lines of Ray's output."""
        return self._ray.log_tail()

    async def start(self) -> None:
        """Start Ray. Raises StartFailed."""
        try:
            await asyncio.to_thread(self._ray.start)
        except RayDidNotStart as error:
            raise StartFailed(f"{error}\n  its log: {self._ray.log_file}") from None
        self._up.set()

    async def stop_starting(self, starting: asyncio.Future[None]) -> None:
        """Stop a Ray that is still starting. `starting`: the future of the running call of `start`.

        The start runs in a thread, and the thread ends only when the Ray process ends.
        """
        while not starting.done():
            await self.stop()
            await asyncio.wait([starting], timeout=POLL_S)
        with suppress(StartFailed):
            await starting

    async def stop(self) -> None:
        """End Ray and its processes."""
        await asyncio.to_thread(self._ray.stop)

    async def address(self) -> tuple[str, dict[str, str]]:
        """Wait until Ray is up. Returns Ray's address, and the environment variables with which a process joins Ray."""
        await self._up.wait()
        return self._ray.address, self._ray.environment()

    async def replace_when_dead(
        self,
        is_unused: Callable[[], Awaitable[bool]],
        others: Callable[[], Collection[int]],
        report: Callable[[str], None],
    ) -> None:
        """Start a new Ray whenever the current Ray's head process has ended. Runs until cancelled.

        Before a new Ray starts, all processes of the cluster except those in `others` are ended, since engines cannot
        outlive the head. This ends the controller too, and `keep_alive` restarts it. `others`: returns the ids of the
        processes to keep. `is_unused`: returns whether no worker is linked to the gateway. If Ray is being stopped
        and waits for its processes, it is killed as soon as `is_unused` returns True.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            if self._ray.is_draining and await is_unused():
                self._ray.kill()  # otherwise Ray waits for the processes of Ray Serve until the drain timeout
            if self._ray.pid is not None:
                continue
            self._up.clear()
            report(f"ray ended; starting a new one, models load again; its log: {self._ray.log_file}")
            await asyncio.to_thread(reaper.end, self._settings.instance, self._ray.folder, keep=others())
            self._ray = LocalRay(self._settings)
            try:
                await self.start()
            except StartFailed as error:
                report(str(error))


def link_session(link: Path, folder: Path | None) -> None:
    """Make `link` a symbolic link to Ray's session folder. The session folder of the previous run is deleted.

    If `folder` is None, the cluster has no local Ray, and `link` is removed.
    """
    if link.is_symlink():
        previous = link.readlink()
        if previous.name.startswith("headrace-") or previous.parent == link.parent:
            shutil.rmtree(previous, ignore_errors=True)
        link.unlink()
    if folder is not None:
        link.symlink_to(folder)
