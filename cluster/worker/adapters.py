"""The adapters (LoRA) of one worker: fetched, checked and loaded as its gateways want, and reported to all of them.

Each adapter is prepared in a task of its own: fetched and checked in a thread, then loaded into the engine while there
is room. An adapter that is checked and finds no room is ready, too: its next request loads it first, in place of the
least recently used one, and only this request waits. If it has waited for HOLD_S, it is refused, and the adapter counts
as loading until it is loaded: its requests wait at the gateways, where they hold up no others. Meanwhile the adapter
whose turn it is to be replaced takes no further requests, so that steady requests for some adapters do not keep others
out. A failed adapter is
tried again after a while and reported with the reason. What is no longer wanted refuses new requests, and leaves the
engine when its last request has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import structlog

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.api.outcomes import Outcome
from cluster.api.ports import AdapterEngine, EngineCorrupt, EngineDead, EngineRefused
from cluster.api.types import EngineInfo
from cluster.policy.adapters.desired import DesiredSet
from cluster.policy.adapters.memory import AdapterMemory
from cluster.wire.codecs.adapter_codec import AdapterSet
from cluster.wire.outbox import Outbox
from cluster.worker.weights.adapter_store import StoredAdapter

log = structlog.get_logger("worker")

REPORT_S: Final = 0.1
"""Least time in seconds between two reports to the gateways."""
REPORT_S_EACH: Final = 0.0005
"""Least time in seconds between two reports, for each adapter: a report has all adapters, and costs a gateway a
hundredth of that time for each."""
MOVES: Final = 4
"""Number of these times that a report waits if nothing has changed but which adapters lie in a slot, as each request
may change that."""
RETRY_S: Final = 5.0
"""Seconds before a failed adapter is tried again. Doubled after each failure, up to MAX_RETRY_S."""
MAX_RETRY_S: Final = 300.0
HOLD_S: Final = 2.0
"""Longest time in seconds for which a request waits here until its adapter is in the engine's memory."""
PARALLEL_FETCHES: Final = 2
"""Fetches at a time. Each occupies one of the few threads that also validate long prompts."""


class AdapterFiles(Protocol):
    """The adapters on this node's disk. weights/adapter_store.py implements it."""

    def fetch(self, spec: AdapterSpec) -> StoredAdapter:
        """Fetch an adapter unless it is here, and check it. Blocks. Raises ValueError or OSError."""

    def mark_refused(self, digest: str, reason: str) -> None:
        """Record that the engine failed when it loaded this adapter."""


@dataclass(eq=False, slots=True)
class WantedAdapter:
    """An adapter that the worker is to have, and how far it is. `digest`: "" until its files are checked."""

    spec: AdapterSpec
    digest: str = ""
    folder: str = ""
    state: AdapterState = AdapterState.LOADING
    reason: str = ""
    failures: int = 0
    work: asyncio.Task[None] | None = None

    def is_same(self, spec: AdapterSpec) -> bool:
        """Return whether `spec` needs no other files. It may name the digest that this worker has found."""
        plain = {"pinned": False, "tenants": (), "digest": ""}
        is_other = replace(self.spec, **plain) != replace(spec, **plain)  # type: ignore[arg-type]
        return not is_other and spec.digest in ("", self.digest or self.spec.digest)


class WorkerAdapters:
    """The adapters of one worker. Without `engine` and `files` the worker has none, and refuses requests for them."""

    def __init__(
        self,
        info: EngineInfo,
        engine: AdapterEngine | None,
        files: AdapterFiles | None,
        report_dead: Callable[[EngineDead], None],
        *,
        version: str = "",
        retry_s: float = RETRY_S,
        report_s: float = REPORT_S,
        hold_s: float = HOLD_S,
    ) -> None:
        """`report_dead`: is called if the engine must be replaced. `version`: the model's version that runs here."""
        has_adapters = bool(info.adapter_slots) and engine is not None and files is not None
        self._engine = engine if has_adapters else None
        self._files = files if has_adapters else None
        self._memory = AdapterMemory(info.adapter_slots, info.adapter_capacity)
        self._report_dead = report_dead
        self._version = version
        self._retry_s = retry_s
        self._report_s = report_s
        self._hold_s = hold_s
        self._desired: DesiredSet[tuple[AdapterSpec, ...]] = DesiredSet(())
        self._wanted: dict[str, WantedAdapter] = {}
        self._folders: dict[str, str] = {}
        """Folders of the adapters for which requests are accepted, by digest."""
        self._links: dict[int, Outbox] = {}
        self._fetches = asyncio.Semaphore(PARALLEL_FETCHES)
        self._changing = asyncio.Lock()  # held while the engine's memory changes
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._overdue: set[str] = set()
        """Adapters whose load takes longer than a request may wait for it."""
        self._closing = ""
        """The adapter in memory that takes no further requests, so that it can be replaced."""
        self._unused = asyncio.Event()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- links

    def attach(self, link: int, outbox: Outbox) -> None:
        """Report to a new link, now and at each change."""
        if self._engine is not None:
            self._links[link] = outbox
            outbox.adapters(self.statuses())

    def detach(self, link: int) -> None:
        """Forget a link that has ended. Its set stays in effect until another gateway sends one."""
        self._links.pop(link, None)
        self._desired.forget(link)

    def receive(self, link: int, adapters: AdapterSet) -> None:
        """Apply the set of adapters that a gateway has sent, if it is the newest."""
        if self._engine is not None and self._desired.receive(link, adapters.revision, adapters.adapters):
            self._apply(self._desired.value)

    def statuses(self) -> Sequence[AdapterStatus]:
        """Return the states of all wanted adapters."""
        residents = self._memory.residents
        return [self._status(name, adapter, residents) for name, adapter in self._wanted.items()]

    def _status(self, name: str, adapter: WantedAdapter, residents: Collection[str]) -> AdapterStatus:
        digest, is_ready = adapter.digest or adapter.spec.digest, adapter.state is AdapterState.READY
        if is_ready and self._waits_for_turn(digest):
            return AdapterStatus(name, digest, AdapterState.LOADING, _overdue(self._memory.capacity))
        return AdapterStatus(name, digest, adapter.state, adapter.reason, is_ready and digest in residents)

    async def run(self) -> None:
        """Report changes to all links until cancelled."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                self._cancel_timer()
                statuses = self.statuses()
                for outbox in self._links.values():
                    outbox.adapters(statuses)
                await asyncio.sleep(self._pause_s)
        finally:
            self._cancel_timer()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def _pause_s(self) -> float:
        """Seconds between two reports."""
        return max(self._report_s, REPORT_S_EACH * len(self._wanted))

    def _moved(self) -> None:
        """Report after a while that other adapters lie in the engine's slots."""
        if self._timer is None and not self._changed.is_set():
            self._timer = asyncio.get_running_loop().call_later(MOVES * self._pause_s, self._changed.set)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- requests

    def is_held(self, digest: str) -> bool:
        """Return whether `hold` returns without waiting: the engine has the adapter in memory."""
        return not digest or digest in self._memory

    async def hold(self, digest: str) -> None:
        """Make sure that the engine holds the adapter until `release`, and load it first if need be.

        Does nothing for the base model (""). Raises EngineRefused ADAPTER_INVALID for an adapter that is not ready
        here or has not been loaded in HOLD_S seconds, and EngineDead.
        """
        if not digest:
            return
        if digest not in self._folders:
            raise _refused(f"{digest[:80]!r} is not ready on this worker")
        if self._waits_for_turn(digest):
            raise _refused(_overdue(self._memory.capacity))
        if self._memory.begin_use(digest):
            self._moved()
        try:
            async with asyncio.timeout(self._hold_s):
                while digest not in self._memory:
                    await asyncio.shield(self._loading(digest))
        except TimeoutError:
            self.release(digest)
            if digest in self._loads:
                self._overdue.add(digest)
                self._unused.set()  # the load closes an adapter
                self._changed.set()
            raise _refused(_overdue(self._memory.capacity)) from None
        except BaseException:
            self.release(digest)
            raise

    def _waits_for_turn(self, digest: str) -> bool:
        return digest in self._overdue or (bool(digest) and digest == self._closing)

    def release(self, digest: str) -> None:
        """End one use of an adapter, after its request has ended or was refused."""
        if digest and self._memory.end_use(digest):
            self._unused.set()
            if digest not in self._folders:
                self._spawn(self._drop_unwanted())

    # ---- the wanted adapters

    def _apply(self, specs: Sequence[AdapterSpec]) -> None:
        wanted = {spec.name: spec for spec in specs if spec.version in ("", self._version)}
        for name, adapter in list(self._wanted.items()):
            if name in wanted and adapter.is_same(wanted[name]):
                adapter.spec = wanted[name]
            else:
                del self._wanted[name]
                if adapter.work is not None:
                    adapter.work.cancel()
        for name, spec in wanted.items():
            if name not in self._wanted:
                self._wanted[name] = adapter = WantedAdapter(spec)
                adapter.work = self._spawn(self._prepare(adapter))
        self._wanted = {name: self._wanted[name] for name in wanted}
        log.info("adapter.list_received", adapters=len(wanted), revision=self._desired.revision)
        self._index()
        self._spawn(self._drop_unwanted())

    def _index(self) -> None:
        """Derive folders and pins from the wanted adapters, after a change of one."""
        adapters = self._wanted.values()
        self._folders = {adapter.digest: adapter.folder for adapter in adapters if adapter.folder}
        self._memory.pinned = {adapter.digest for adapter in adapters if adapter.spec.pinned and adapter.folder}
        self._unused.set()  # a load that waits for memory looks again
        self._changed.set()

    async def _prepare(self, adapter: WantedAdapter, delay_s: float = 0.0) -> None:
        """Fetch, check and load an adapter, and try again after each failure."""
        files = self._files
        assert files is not None
        while True:
            await asyncio.sleep(delay_s)
            try:
                async with self._fetches:
                    stored = await asyncio.to_thread(files.fetch, adapter.spec)
                adapter.digest, adapter.folder = stored.digest, str(stored.folder)
                self._index()
                if not self._memory.has_place_for(stored.digest):
                    raise _refused(_all_pinned(self._memory.capacity))
                if adapter.spec.pinned or not self._memory.is_full:
                    await asyncio.shield(self._loading(stored.digest))
                adapter.state, adapter.reason, adapter.failures = AdapterState.READY, "", 0
                log.info("adapter.ready", adapter=adapter.spec.name, digest=stored.digest)
                self._changed.set()
                return
            except EngineDead:  # reported by the load
                return
            except EngineRefused as refused:
                reason = refused.message
            except (ValueError, OSError) as error:
                reason = str(error)
            except Exception as error:  # whatever a source's library raises: other adapters go on
                log.exception("adapter.failed", adapter=adapter.spec.name)
                reason = f"{type(error).__name__}: {error}"
            delay_s = self._fail(adapter, reason)

    def _fail(self, adapter: WantedAdapter, reason: str) -> float:
        """Record why an adapter is not served; return the seconds until the next try."""
        delay_s = min(self._retry_s * 2.0 ** min(adapter.failures, 20), MAX_RETRY_S)
        adapter.state, adapter.reason, adapter.folder = AdapterState.FAILED, reason, ""
        adapter.failures += 1
        log.warning("adapter.failed", adapter=adapter.spec.name, reason=reason[:500], retry_s=delay_s)
        self._index()
        return delay_s

    # ---- the engine's memory

    def _loading(self, digest: str) -> asyncio.Task[None]:
        """Return the task that loads an adapter; it goes on if all who wait for it end."""
        task = self._loads.get(digest)
        if task is None:
            self._loads[digest] = task = self._spawn(self._load(digest))
            task.add_done_callback(lambda _: self._load_ended(digest))
        return task

    def _load_ended(self, digest: str) -> None:
        del self._loads[digest]
        if digest in self._overdue:
            self._overdue.remove(digest)
            self._changed.set()

    async def _load(self, digest: str) -> None:
        engine = self._engine
        assert engine is not None
        try:
            async with self._changing:
                if digest in self._memory:
                    return
                await self._make_room(engine, digest)
                folder = self._folders.get(digest)
                if folder is None:
                    raise _refused(f"{digest!r} is no longer wanted on this worker")
                await engine.load_adapter(digest, folder, pinned=digest in self._memory.pinned)
                self._memory.add(digest)
                self._moved()
        except EngineCorrupt as corrupt:
            assert self._files is not None
            await asyncio.to_thread(self._files.mark_refused, digest, str(corrupt))
            self._report_dead(corrupt)
            raise
        except EngineDead as dead:
            self._report_dead(dead)
            raise
        except EngineRefused as refused:
            for adapter in self._wanted.values():  # those that were ready; the others' own tasks try again
                if adapter.digest == digest and adapter.state is AdapterState.READY:
                    adapter.work = self._spawn(self._prepare(adapter, self._fail(adapter, refused.message)))
            raise

    async def _make_room(self, engine: AdapterEngine, digest: str) -> None:
        """Wait until the memory has a place, and drop an adapter for it if need be."""
        try:
            while self._memory.is_full:
                if not self._memory.has_place_for(digest):
                    raise _refused(_all_pinned(self._memory.capacity))
                victim = self._memory.victim()
                if victim is None:
                    if digest in self._overdue and not self._closing:
                        self._close(self._memory.oldest() or "")
                    self._unused.clear()
                    await self._unused.wait()
                    continue
                self._memory.remove(victim)
                await engine.unload_adapter(victim)
        finally:
            if self._closing:
                self._close("")

    def _close(self, digest: str) -> None:
        """Let an adapter in memory take no further requests; "" for none."""
        self._closing = digest
        self._changed.set()

    async def _drop_unwanted(self) -> None:
        """Remove what is held, no longer wanted and not in use."""
        engine = self._engine
        assert engine is not None
        async with self._changing:
            for digest in list(self._memory.held):
                if self._is_wanted(digest) or self._memory.uses(digest):
                    continue
                self._memory.remove(digest)
                try:
                    await engine.unload_adapter(digest)
                except EngineDead as dead:
                    self._report_dead(dead)
                    return
                log.info("adapter.dropped", digest=digest)
        self._unused.set()

    def _is_wanted(self, digest: str) -> bool:
        return any(digest in (adapter.digest, adapter.spec.digest) for adapter in self._wanted.values())

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, EngineRefused | EngineDead):
            log.error("adapter.task_failed", error=f"{type(error).__name__}: {error}")


def _refused(message: str) -> EngineRefused:
    return EngineRefused(Outcome.ADAPTER_INVALID.name, f"adapter: {message}", "adapter")


def _overdue(capacity: int) -> str:
    return f"the adapter waits for the engine's memory, whose {capacity} adapters (engine.max_cpu_loras) are in use"


def _all_pinned(capacity: int) -> str:
    return f"the engine's memory is full of {capacity} pinned adapters: raise engine.max_cpu_loras, or pin fewer"
