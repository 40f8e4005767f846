"""The live overview of one gateway process: one snapshot per second while there are subscribers. All subscribers share
the result.

Invariants: while there are no subscribers and no requests for the overview, the only work is one sample of the history
every STEP_S. Each tick takes one snapshot of the gateway, makes one document, and computes and encodes the changes once
for each tenant with subscribers. A subscriber holds at most MAX_PENDING unread events; a subscriber that does not read
is disconnected.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.console.history.sampling import HistorySampler
from cluster.gateway.console.overview import overview
from cluster.gateway.console.overview.overview import Document
from cluster.gateway.console.overview.parts import STEP_S, LimitUses, Part, PartMaker
from cluster.gateway.console.overview.scaling_reasons import ScalingReasons
from cluster.gateway.console.overview.survey import GatewayParts, Survey
from cluster.gateway.console.peers.peers import NO_PEERS, Peers

if TYPE_CHECKING:
    from cluster.gateway.console.history.history import History
    from cluster.gateway.console.overview.deltas import Index

log = structlog.get_logger("console")
_T = TypeVar("_T")

TICK_S: Final = 1.0
"""Seconds between two documents."""
LATE_S: Final = 0.02
"""Delay in seconds from the beginning of a history step to its sample. Without the delay, a small difference between
two clocks could put a sample into the previous step, which has a sample already."""
MAX_SUBSCRIBERS: Final = 32
"""Maximum number of subscribers of one process."""
MAX_PENDING: Final = 8
"""Maximum number of unread events of a subscriber. A subscriber with more is cut, that is disconnected."""
END: Final = b"end"
"""Name of the event after which a stream ends."""
FRESH_S: Final = 0.25
"""Minimum seconds from one document to the next if a request or a new subscriber waits for the next document. Without
subscribers, a request gets the last document if its age is at most FRESH_S."""


@dataclass(frozen=True, slots=True)
class Names:
    """The fields of an overview document that describe the cluster as a whole. `has_cost`: whether GPU-seconds have
    prices."""

    cluster: str
    version: str
    has_cost: bool = False


class Subscriber:
    """A subscriber to the overview: one event stream of a viewer. `tenant`: the only tenant that the viewer may see, ""
    for all. An event is a pair: its name, and its data as JSON."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.is_cut = False
        self.on_cut: Callable[[], None] = _nothing
        """Function that is called when the subscriber is disconnected because it has too many unread events."""
        self._events: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue(MAX_PENDING)

    def push(self, name: bytes, data: bytes) -> None:
        """Append an event. If there are MAX_PENDING unread events already, disconnect the subscriber instead."""
        try:
            self._events.put_nowait((name, data))
        except asyncio.QueueFull:
            self.is_cut = True
            self.on_cut()

    async def next_event(self) -> tuple[bytes, bytes]:
        """Wait for the next event and return it."""
        return await self._events.get()


def _nothing() -> None:
    """Do nothing."""


@dataclass(slots=True)
class _View:
    """The subscribers that may see the same tenant, and the document that they see."""

    subscribers: set[Subscriber] = field(default_factory=set)
    new: set[Subscriber] = field(default_factory=set)
    """The subscribers that have not been sent a document yet."""
    document: Document | None = None
    index: Index = field(default_factory=dict)


class LiveOverview:
    """Maker of the overview documents of one gateway process. It sends the documents and their changes to the
    subscribers.

    Requests that wait for a document at the same time all get the same document. The same is true for requests for this
    process's part of the overview.
    """

    def __init__(
        self,
        parts: GatewayParts,
        maker: PartMaker,
        scaling: ScalingReasons,
        names: Names,
        models_of: Callable[[str], Mapping[str, Sequence[str]]],
        has_history: bool = True,
    ) -> None:
        """Create the overview of one gateway process. `models_of`: returns the models that a tenant may use, each with
        its aliases. `has_history`: whether the values of the last hour are kept."""
        self._parts = parts
        self.recent = parts.recent
        """The newest ended calls of this process."""
        self._survey = Survey(parts)
        self._maker = maker
        self._scaling = scaling
        self._names = names
        self._models_of = models_of
        self.peers: Peers = NO_PEERS
        """The other processes of the cluster."""
        self._clock = parts.service.clock
        self._views: dict[str, _View] = {}
        self._waiters: list[asyncio.Future[Document]] = []
        self._part_waiters: list[asyncio.Future[Part]] = []
        self._part: Part | None = None
        self._document: Document | None = None
        self._made_at = -math.inf
        self._next_sample = self._clock() if has_history else math.inf
        self._sampler = HistorySampler()
        self._wake = asyncio.Event()
        self._is_closed = False
        self.ticks = 0
        """Number of documents that were made."""

    # ---- viewers

    def subscribe(self, tenant: str) -> Subscriber | None:
        """Return a new subscriber, which gets the whole document first; None if there are too many subscribers."""
        if self._is_closed or sum(len(view.subscribers) for view in self._views.values()) >= MAX_SUBSCRIBERS:
            return None
        subscriber = Subscriber(tenant)
        view = self._views.setdefault(tenant, _View())
        view.subscribers.add(subscriber)
        view.new.add(subscriber)
        self._wake.set()
        return subscriber

    @property
    def has_cost(self) -> bool:
        """Whether GPU-seconds have prices. Without prices, costs are None instead of 0."""
        return self._names.has_cost

    @property
    def history(self) -> History | None:
        """The last hour of this process; None before the first sample."""
        return self._sampler.history

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber. Idempotent."""
        view = self._views.get(subscriber.tenant)
        if view is None:
            return
        view.subscribers.discard(subscriber)
        view.new.discard(subscriber)
        if not view.subscribers:
            del self._views[subscriber.tenant]

    def close(self) -> None:
        """End all streams, because the gateway stops. Viewers may connect to another gateway."""
        self._is_closed = True
        for view in self._views.values():
            for subscriber in view.subscribers:
                subscriber.push(END, b'{"reason":"stopping"}')

    async def document(self, tenant: str) -> Document:
        """Return the document as of now. `tenant`: the only tenant that the viewer may see, "" for all tenants."""
        document = self._document
        if document is None or self._clock() - self._made_at > self._fresh_s:
            document = await self._wait(self._waiters)
        return await overview.view_of(document, tenant, lambda: self._models_of(tenant))

    @property
    def _fresh_s(self) -> float:
        """Maximum age, in seconds, at which a cached document or part may still be returned.

        While there are subscribers it is TICK_S, since a new document and a new part are made for them once in
        this time.
        """
        return TICK_S if self._views else FRESH_S

    async def part(self) -> Part:
        """Return this process's part of the overview, as of now. Other gateway processes request this part."""
        part = self._part
        if part is None or self._clock() - self._made_at > self._fresh_s:
            part = await self._wait(self._part_waiters)
        return part

    async def _wait(self, waiters: list[asyncio.Future[_T]]) -> _T:
        waiter: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        self._wake.set()
        return await waiter

    # ---- the loop

    async def run(self) -> None:
        """Make the overview regularly while anybody needs it, and add samples to the history. Runs until cancelled."""
        self.peers.start()
        try:
            while True:
                await self._rest()
                try:
                    await self._tick()
                except Exception:  # a defect in one tick must not end the console
                    log.exception("console.tick_failed")
                    self._made_at = self._clock()
                    _fail(self._waiters)
                    _fail(self._part_waiters)
        finally:
            await self._scaling.close()
            await self.peers.close()

    async def _rest(self) -> None:
        """Wait until the next tick is due. A new subscriber or request can bring the next tick forward."""
        while (left_s := self._due_in_s()) > 0:
            self._wake.clear()
            try:
                async with asyncio.timeout(None if left_s == math.inf else left_s):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _due_in_s(self) -> float:
        now = self._clock()
        due = self._next_sample
        if self._waiters or self._part_waiters or any(view.new for view in self._views.values()):
            due = min(due, self._made_at + FRESH_S)
        elif self._views:
            due = min(due, self._made_at + TICK_S)
        return due - now

    async def _tick(self) -> None:
        now = self._clock()
        is_shown = bool(self._views or self._waiters)
        is_needed = is_shown or bool(self._part_waiters)
        is_due = now >= self._next_sample
        if is_due:  # first, so that a failure is not repeated at once
            self._next_sample = now + STEP_S - self._parts.wall() % STEP_S + LATE_S
        self.recent.forget_old()
        shot = await self._survey.look(with_rows=is_needed)
        if is_due:
            self._parts.lost.current(now)
            await self._sampler.sample(shot)
        if not is_needed:
            shot.calls = []
            if now - self._made_at > STEP_S:
                self._maker.rest(shot)
                self._part = self._document = None
            return
        self._made_at = now
        parts = self._parts
        limits = LimitUses(parts.utilization(), parts.budgets(), shot.policies)
        self._part = await self._maker.make(shot, limits)
        _answer(self._part_waiters, self._part)
        if not is_shown:
            return
        document = await self._make(self._part, now)
        _answer(self._waiters, document)
        for tenant, view in list(self._views.items()):
            await self._show(tenant, view, document)

    async def _make(self, part: Part, now: float) -> Document:
        """Merge `part`, which describes this process, with the parts of the other processes. Returns the document of
        the whole cluster."""
        self._scaling.refresh(self._parts.directory.models, now)
        others = await self.peers.parts(now)
        document = await overview.merge([part, *others], self._parts.wall(), self._names.has_cost)
        document |= {"cluster": self._names.cluster, "version": self._names.version}
        for row in document["models"]:
            row["frozen"] = self._scaling.is_frozen(row["id"])
        document["scaling"] = self._scaling.rows(document["models"])
        self._document, self.ticks = document, self.ticks + 1
        return document

    async def _show(self, tenant: str, view: _View, document: Document) -> None:
        """Send the changes to the subscribers of a view. New subscribers get the whole document instead."""
        from cluster.gateway.console.overview import deltas

        before, old = view.document, view.index
        after = await overview.view_of(document, tenant, lambda: self._models_of(tenant))
        await asyncio.sleep(0)  # the next step is long in a large cluster
        index = deltas.index_of(after)
        await asyncio.sleep(0)
        new = set(view.new)
        if before is not None and view.subscribers - new:
            data = await deltas.encode(await deltas.difference(before, old, after, index))
            for subscriber in view.subscribers - new:
                if subscriber not in view.new:
                    subscriber.push(b"delta", data)
        if new:
            state = await deltas.encode(after)
            for subscriber in new & view.subscribers:
                subscriber.push(b"state", state)
        view.new -= new
        view.document, view.index = after, index


def _answer(waiters: list[asyncio.Future[_T]], value: _T) -> None:
    """Give each waiting request the document or the part that it has asked for."""
    for waiter in waiters:
        if not waiter.done():  # else its request was cancelled
            waiter.set_result(value)
    waiters.clear()


def _fail(waiters: list[asyncio.Future[_T]]) -> None:
    """End each waiting request with an error."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_exception(CallError(Outcome.INTERNAL, "the overview could not be made; the log says why"))
    waiters.clear()
