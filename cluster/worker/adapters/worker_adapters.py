"""The adapters that a worker's gateways want. The worker prepares and loads these adapters, and reports their states.

Each adapter is prepared in its own task. A thread fetches and checks the adapter's files (fetches.py). Then the engine
loads the adapter, if the engine's memory has room. If it has no room, the checked adapter is reported as ready too, and
is loaded for the next request that names it (loads.py). A failed adapter is reported with the reason, and is tried
again after a while, or at once if it is loaded again. An adapter that is no longer wanted takes no new requests, and is
removed from the engine when its last request has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import structlog

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.api.ports import AdapterEngine, EngineDead, EngineRefused
from cluster.api.types import EngineInfo
from cluster.policy.adapters.desired import DesiredSet
from cluster.policy.adapters.memory import AdapterMemory
from cluster.policy.catalog.source_texts import without_credentials
from cluster.wire.codecs.adapter_codec import AdapterSet
from cluster.wire.outbox import Outbox
from cluster.worker.adapters.fetches import SILENCE_S, AdapterFetches
from cluster.worker.adapters.loads import HOLD_S, AdapterLoads
from cluster.worker.adapters.port import AdapterFiles
from cluster.worker.adapters.reports import REPORT_S, AdapterReports
from cluster.worker.adapters.tasks import AdapterTasks

log = structlog.get_logger("worker")

RETRY_S: Final = 5.0
"""Seconds before a failed adapter is tried again. Doubled after each failure, up to MAX_RETRY_S."""
MAX_RETRY_S: Final = 300.0


@dataclass(eq=False, slots=True)
class WantedAdapter:
    """An adapter that the worker is to serve, and the progress of its preparation.

    `digest`: "" until the files are checked.
    """

    spec: AdapterSpec
    digest: str = ""
    folder: str = ""
    state: AdapterState = AdapterState.LOADING
    reason: str = ""
    failures: int = 0
    work: asyncio.Task[None] | None = None

    def is_same(self, spec: AdapterSpec) -> bool:
        """Return whether the files of this adapter can also serve `spec`, whose version this worker serves.

        They can if `spec` differs from this adapter's own spec at most in `pinned`, `tenants`, `version` and
        `load_number`, and if the digest in `spec` is empty or equal to the digest of the files. If the adapter is
        ready, `license` may differ too: as for a model, it is checked when the files are next fetched. If the adapter
        is not ready, it may need the new license for that.
        """
        plain = {"pinned": False, "tenants": (), "version": "", "digest": "", "load_number": 0}
        if self.state is AdapterState.READY:
            plain["license"] = ""
        is_other = replace(self.spec, **plain) != replace(spec, **plain)  # type: ignore[arg-type]
        return not is_other and spec.digest in ("", self.digest or self.spec.digest)

    def is_retried_by(self, spec: AdapterSpec) -> bool:
        """Return whether this adapter has failed and `spec` comes from another request to load it."""
        return self.state is AdapterState.FAILED and self.spec.load_number != spec.load_number


class WorkerAdapters:
    """The adapters of one worker.

    If `engine` or `files` is None, the worker has no adapters and refuses requests for them.
    """

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
        silence_s: float = SILENCE_S,
    ) -> None:
        """Create the object without adapters; gateways send the adapters that they want.

        `report_dead`: is called if the engine must be replaced. `version`: the version of the model that this worker
        runs. `silence_s`: seconds without progress after which the fetch of an adapter has failed.
        """
        has_adapters = bool(info.adapter_slots) and engine is not None and files is not None
        self._files = files if has_adapters else None
        self._version = version
        self._retry_s = retry_s
        self._desired: DesiredSet[tuple[AdapterSpec, ...]] = DesiredSet(())
        self._wanted: dict[str, WantedAdapter] = {}
        self._fetches = None if self._files is None else AdapterFetches(self._files, silence_s)
        self._tasks = AdapterTasks()
        self._reports = AdapterReports(self.statuses, report_s)
        self.loads = AdapterLoads(
            engine if has_adapters else None,
            AdapterMemory(info.adapter_slots, info.adapter_capacity),
            self._reports,
            self._tasks,
            report_dead=report_dead,
            mark_corrupting=self._mark_corrupting,
            mark_refused=self._retry_refused,
            hold_s=hold_s,
        )
        """The adapters in the engine's memory, which requests hold."""

    def attach(self, link: int, outbox: Outbox) -> None:
        """Add a link, and send its gateway the states of all adapters. `run` sends later changes."""
        if self._files is not None:
            self._reports.attach(link, outbox)

    def detach(self, link: int) -> None:
        """Forget a link that has ended.

        The adapters that its gateway wanted are served until another gateway sends a list of adapters.
        """
        self._reports.detach(link)
        self._desired.forget(link)

    def receive(self, link: int, adapters: AdapterSet) -> None:
        """Record the list of adapters that a gateway has sent, and apply the newest list of all gateways."""
        if self._files is not None and self._desired.receive(link, adapters.revision, adapters.adapters):
            self._apply(self._desired.value)

    def statuses(self) -> Sequence[AdapterStatus]:
        """Return the states of all wanted adapters."""
        residents = self.loads.memory.residents
        return [self._status(name, adapter, residents) for name, adapter in self._wanted.items()]

    def _status(self, name: str, adapter: WantedAdapter, residents: Collection[str]) -> AdapterStatus:
        spec, is_ready = adapter.spec, adapter.state is AdapterState.READY
        digest, number = adapter.digest or spec.digest, spec.load_number
        if is_ready and (why := self.loads.why_waiting(digest)):
            return AdapterStatus(name, digest, AdapterState.LOADING, why, load_number=number)
        return AdapterStatus(name, digest, adapter.state, adapter.reason, is_ready and digest in residents, number)

    async def run(self) -> None:
        """Report changes of the adapters' states to all links until cancelled. Then end all work on adapters, without
        waiting for fetches that have begun."""
        try:
            await self._reports.run()
        finally:
            await self._tasks.cancel()
            if self._fetches is not None:
                await self._fetches.close()

    def _apply(self, specs: Sequence[AdapterSpec]) -> None:
        wanted = {spec.name: spec for spec in specs if spec.version in ("", self._version)}
        for name, adapter in list(self._wanted.items()):
            spec = wanted.get(name)
            if spec is not None and adapter.is_same(spec) and not adapter.is_retried_by(spec):
                adapter.spec = spec
            else:
                del self._wanted[name]
                if adapter.work is not None:
                    adapter.work.cancel()
        for name, spec in wanted.items():
            if name not in self._wanted:
                self._wanted[name] = adapter = WantedAdapter(spec)
                adapter.work = self._tasks.spawn(self._prepare(adapter))
        self._wanted = {name: self._wanted[name] for name in wanted}
        log.info("adapter.list_received", adapters=len(wanted), revision=self._desired.revision)
        self._index()
        self._tasks.spawn(self.loads.drop_unwanted())

    def _index(self) -> None:
        """Update `loads` and the reports after a change of the wanted adapters."""
        adapters = self._wanted.values()
        served = [adapter for adapter in adapters if adapter.folder]
        self.loads.set_wanted(
            {adapter.digest: adapter.folder for adapter in served},
            {adapter.digest for adapter in served if adapter.spec.pinned},
            {digest for adapter in adapters for digest in (adapter.digest, adapter.spec.digest)},
        )
        self._reports.mark_changed()

    async def _prepare(self, adapter: WantedAdapter, delay_s: float = 0.0) -> None:
        """Fetch, check and load an adapter, and try again after each failure."""
        fetches = self._fetches
        assert fetches is not None
        while True:
            await asyncio.sleep(delay_s)
            try:
                stored = await fetches.fetch(adapter.spec)
                adapter.digest, adapter.folder = stored.digest, str(stored.folder)
                self._index()
                self.loads.check_place(stored.digest)
                if adapter.spec.pinned or not self.loads.memory.is_full:
                    await asyncio.shield(self.loads.load(stored.digest))
                adapter.state, adapter.reason, adapter.failures = AdapterState.READY, "", 0
                log.info("adapter.ready", adapter=adapter.spec.name, digest=stored.digest)
                self._reports.mark_changed()
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
        reason = without_credentials(reason)
        delay_s = min(self._retry_s * 2.0 ** min(adapter.failures, 20), MAX_RETRY_S)
        adapter.state, adapter.reason, adapter.folder = AdapterState.FAILED, reason, ""
        adapter.failures += 1
        log.warning("adapter.failed", adapter=adapter.spec.name, reason=reason[:500], retry_s=delay_s)
        self._index()
        return delay_s

    def _retry_refused(self, digest: str, reason: str) -> None:
        """Handle the engine's refusal to load the adapters with this digest. After a delay, prepare again those of the
        adapters that were ready."""
        for adapter in self._wanted.values():  # the tasks of adapters that are not ready try again themselves
            if adapter.digest == digest and adapter.state is AdapterState.READY:
                adapter.work = self._tasks.spawn(self._prepare(adapter, self._fail(adapter, reason)))

    def _mark_corrupting(self, digest: str, reason: str) -> None:
        assert self._files is not None
        self._files.mark_corrupting(digest, reason)
