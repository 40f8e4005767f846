"""The adapters in the memory of a worker's engine: how they are loaded, how they are removed to make room, and which
requests use them.

The first request for an adapter that is not in memory starts its load. If the memory is full, the least recently used
adapter is removed first. The request waits at most HOLD_S seconds. If the load takes longer, the request is refused.
Further requests for the adapter then wait at the gateways until the load ends; they delay no other requests there.

If every adapter in memory is in use and any load takes longer than HOLD_S, the least recently used adapter takes no new
requests until it is removed. Otherwise steady requests for the adapters in memory could delay a load forever, and with
it all others, since one load at a time changes the memory. This also holds for a load that no request waits for.

An adapter whose load took longer than HOLD_S stays in memory for a moment after it, so that the requests that wait at
the gateways arrive before it makes room for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from typing import Final

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.ports import AdapterEngine, EngineCorrupt, EngineDead, EngineRefused
from cluster.policy.adapters.memory import AdapterMemory
from cluster.worker.adapters.reports import AdapterReports
from cluster.worker.adapters.tasks import AdapterTasks

log = structlog.get_logger("worker")

HOLD_S: Final = 2.0
"""Longest time in seconds for which a request waits here until its adapter is in the engine's memory."""
SPARED_PART: Final = 0.5
"""Part of HOLD_S for which an adapter stays in memory after an overdue load, so that its requests can arrive."""


class AdapterLoads:
    """The adapters in one engine's memory.

    If `engine` is None, there are no adapters, and requests for adapters are refused.
    """

    def __init__(
        self,
        engine: AdapterEngine | None,
        memory: AdapterMemory,
        reports: AdapterReports,
        tasks: AdapterTasks,
        *,
        report_dead: Callable[[EngineDead], None],
        mark_corrupting: Callable[[str, str], None],
        mark_refused: Callable[[str, str], None],
        hold_s: float = HOLD_S,
    ) -> None:
        """Create the object for an engine that holds no adapter yet.

        `report_dead`: is called if the engine must be replaced. `mark_corrupting(digest, reason)`: is called, in a
        thread, if loading the adapter has corrupted the engine. `mark_refused(digest, reason)`: is called if the
        engine refuses to load the adapter. `hold_s`: longest time in seconds for which a request waits.
        """
        self.memory = memory
        self._engine = engine
        self._reports = reports
        self._tasks = tasks
        self._report_dead = report_dead
        self._mark_corrupting = mark_corrupting
        self._mark_refused = mark_refused
        self._hold_s = hold_s
        self._folders: Mapping[str, str] = {}
        """Folders of the adapters for which requests are accepted, by digest."""
        self._wanted: Set[str] = frozenset()
        """Digests of the adapters that stay in memory until they must make room."""
        self._changing = asyncio.Lock()  # held while the engine's memory changes
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._overdue: set[str] = set()
        """Adapters whose load takes longer than a request may wait for it, whether or not requests wait."""
        self._spared: set[str] = set()
        """Adapters in memory whose requests may be on their way back from the gateways."""
        self._closing = ""
        """The adapter in memory that takes no further requests, so that it can be replaced."""
        self._unused = asyncio.Event()

    def set_wanted(self, folders: Mapping[str, str], pinned: Set[str], wanted: Set[str]) -> None:
        """Set the adapters that are to be served.

        `folders`: folder of each adapter that is ready, by digest; requests for other adapters are refused. `pinned`:
        digests of the adapters that are never removed to make room. `wanted`: digests of all adapters to serve, ready
        or not.
        """
        self._folders, self._wanted = folders, wanted
        self.memory.pin(pinned)
        self._unused.set()  # a load that waits for memory looks again

    # ---- requests

    def is_held(self, digest: str) -> bool:
        """Return whether the engine has the adapter in memory, so that a request need not wait.

        True for "", the base model.
        """
        return not digest or digest in self.memory

    async def hold(self, digest: str) -> None:
        """Load the adapter if it is not in the engine's memory, and keep it there until `release`.

        Does nothing for the base model (""). Raises EngineRefused ADAPTER_INVALID if the adapter is not ready here,
        takes no requests now, or is not loaded within `hold_s` seconds. Raises EngineDead if the engine must be
        replaced.
        """
        if not digest:
            return
        if digest not in self._folders:
            raise adapter_refused(f"{digest[:80]!r} is not ready on this worker")
        if why := self.why_waiting(digest):
            raise adapter_refused(why)
        if self.memory.begin_use(digest):
            self._reports.mark_moved()
        try:
            async with asyncio.timeout(self._hold_s):
                while digest not in self.memory:
                    await asyncio.shield(self.load(digest))
        except TimeoutError:
            self.release(digest)
            if digest in self._loads:
                self._mark_overdue(digest)
            self._reports.mark_changed()  # a gateway sends no calls for a refused adapter until the next report
            raise adapter_refused(self._all_in_use) from None
        except BaseException:
            self.release(digest)
            raise

    def why_waiting(self, digest: str) -> str:
        """Return why an adapter takes no new requests although its files are ready; "" if it takes requests.

        There are two reasons. Loading the adapter into the engine already takes longer than a request may wait. Or
        the adapter is about to be removed from the engine.
        """
        waits = digest in self._overdue or (bool(digest) and digest == self._closing)
        return self._all_in_use if waits else ""

    @property
    def _all_in_use(self) -> str:
        return (
            f"the adapter waits for the engine's memory, whose {self.memory.capacity} adapters (engine.max_cpu_loras) "
            "are in use"
        )

    def release(self, digest: str) -> None:
        """Record that a request no longer uses an adapter, because the request has ended or was refused."""
        if digest and self.memory.end_use(digest):
            self._unused.set()
            if digest not in self._folders:
                self._tasks.spawn(self.drop_unwanted())

    # ---- the engine's memory

    def load(self, digest: str) -> asyncio.Task[None]:
        """Return the task that loads an adapter. The task continues even if all requests that wait for it end."""
        task = self._loads.get(digest)
        # A task that is done stays here until its callback runs. To await it would not let the event loop run, so that
        # a request would wait for ever if the adapter was dropped meanwhile.
        if task is None or task.done():
            self._loads[digest] = task = self._tasks.spawn(self._load(digest))
            timer = asyncio.get_running_loop().call_later(self._hold_s, self._mark_overdue, digest)
            task.add_done_callback(lambda ended: self._load_ended(digest, ended, timer))
        return task

    def _mark_overdue(self, digest: str) -> None:
        """Record that the load of an adapter takes longer than a request may wait for it."""
        self._overdue.add(digest)
        self._unused.set()  # the load that waits for memory closes an adapter
        self._reports.mark_changed()

    def _load_ended(self, digest: str, task: asyncio.Task[None], timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        if self._loads.get(digest) is not task:  # the adapter is loaded again
            return
        del self._loads[digest]
        if digest in self._overdue:
            self._overdue.remove(digest)
            self._reports.mark_changed()

    async def _load(self, digest: str) -> None:
        engine = self._engine
        assert engine is not None
        try:
            async with self._changing:
                if digest in self.memory:
                    return
                await self._make_room(engine, digest)
                folder = self._wanted_folder(digest)
                await engine.load_adapter(digest, folder, pinned=digest in self.memory.pinned)
                self.memory.add(digest)
                self._reports.mark_moved()
                if digest in self._overdue:
                    self._spare(digest)
        except EngineCorrupt as corrupt:
            await asyncio.to_thread(self._mark_corrupting, digest, str(corrupt))
            self._report_dead(corrupt)
            raise
        except EngineDead as dead:
            self._report_dead(dead)
            raise
        except EngineRefused as refused:
            self._mark_refused(digest, refused.message)
            raise

    async def _make_room(self, engine: AdapterEngine, digest: str) -> None:
        """Wait until the memory has room for this adapter. Remove another adapter if necessary.

        Raises EngineRefused if the adapter is no longer wanted or the memory has no place for it.
        """
        try:
            while self.memory.is_full:
                self._wanted_folder(digest)
                self.check_place(digest)
                victim = self.memory.victim(self._spared)
                if victim is None:
                    # Any overdue load, since the others wait until this one ends. A closed adapter that has been
                    # pinned since makes no room.
                    is_closing = bool(self._closing) and self._closing not in self.memory.pinned
                    if self._overdue and not is_closing and (oldest := self.memory.oldest(self._spared)):
                        self._close(oldest)
                    self._unused.clear()
                    await self._unused.wait()
                    continue
                self.memory.remove(victim)
                await engine.unload_adapter(victim)
        finally:
            if self._closing:
                self._close("")

    def _spare(self, digest: str) -> None:
        """Keep an adapter in memory until the requests that wait for it at the gateways can have arrived."""
        self._spared.add(digest)
        asyncio.get_running_loop().call_later(SPARED_PART * self._hold_s, self._end_spare, digest)

    def _end_spare(self, digest: str) -> None:
        self._spared.discard(digest)
        self._unused.set()

    def _wanted_folder(self, digest: str) -> str:
        """Return the adapter's folder. Raises EngineRefused if the adapter is no longer wanted."""
        folder = self._folders.get(digest)
        if folder is None:
            raise adapter_refused(f"{digest!r} is no longer wanted on this worker")
        return folder

    def check_place(self, digest: str) -> None:
        """Raise EngineRefused if the memory is full of pinned adapters and this adapter is not one of them."""
        if not self.memory.has_place_for(digest):
            capacity = self.memory.capacity
            raise adapter_refused(
                f"the engine's memory is full of {capacity} pinned adapters: raise engine.max_cpu_loras, or pin fewer"
            )

    def _close(self, digest: str) -> None:
        """Refuse new requests for this adapter, so that it can be removed from memory.

        The digest "" ends the refusal.
        """
        self._closing = digest
        self._reports.mark_changed()

    async def drop_unwanted(self) -> None:
        """Remove the adapters in memory that are neither wanted nor in use."""
        engine = self._engine
        assert engine is not None
        async with self._changing:
            for digest in list(self.memory.held):
                if digest in self._wanted or self.memory.uses(digest):
                    continue
                self.memory.remove(digest)
                try:
                    await engine.unload_adapter(digest)
                except EngineDead as dead:
                    self._report_dead(dead)
                    return
                log.info("adapter.dropped", digest=digest)
        self._unused.set()


def adapter_refused(message: str) -> EngineRefused:
    """Return the error that refuses a request because of its adapter."""
    return EngineRefused(Outcome.ADAPTER_INVALID.name, f"adapter: {message}", "adapter")
