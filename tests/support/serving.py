"""Helpers for tests on a real Ray: the gateway's end of the links, and generation over a link."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.api.output_parts import OutputPart
from cluster.api.types import CatalogEntry, EngineRequest, Sampling, TokenOutput, WorkerIdentity
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.policy.catalog.reconcile import Observed
from cluster.ray.backend import Backend, RaySnapshot
from cluster.wire.lost_engines import LostEngine
from tests.support.links import NoListener

T = TypeVar("T")


@dataclass
class Door(NoListener):
    """A gateway's end of the links: it keeps the newest catalog, and `hub` has the links."""

    hub: Hub = field(init=False)
    address: str = ""
    entries: dict[str, CatalogEntry] = field(default_factory=dict)

    def link_up(self, link: WorkerLink) -> None:
        """Handle a link coming up: do nothing, since `hub.links` has the link."""

    def link_down(self, link: WorkerLink, why: str) -> None:
        """Handle a link ending: do nothing, since `hub.links` no longer has the link."""

    def link_changed(self, link: WorkerLink) -> None:
        """Handle a changed link: do nothing, since `hub.links` has the link."""

    def apply_catalog(self, entries: Sequence[CatalogEntry], revision: int = 0) -> None:
        """Handle a new catalog: store the entries."""
        self.entries = {entry.name: entry for entry in entries}

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return an empty text: no worker is refused."""
        return ""

    keeps_accounts: bool = False

    def lost_engines(self) -> Sequence[LostEngine]:
        """Return the engines that have ended in the last minutes, with the reasons that the workers reported."""
        return self.hub.workers.lost.recent(time.time())

    def link_of(self, model: str) -> WorkerLink | None:
        """Return a link to a worker of the model that has granted credit (free capacity); None if there is none."""
        return next((x for x in self.hub.links if x.identity.model == model and x.free.sequences), None)

    async def worker(self, model: str, timeout_s: float = 240.0, but: str = "") -> WorkerLink:
        """Wait for a worker of `model` whose incarnation (process start) is not `but`, and return the worker's link."""
        return await eventually(
            lambda: (x := self.link_of(model)) and (x if x.identity.incarnation != but else None),
            f"a worker of {model} has dialled in",
            timeout_s,
        )


@asynccontextmanager
async def open_door(host: str = "127.0.0.1", door: Door | None = None) -> AsyncIterator[Door]:
    """Run a link hub (a gateway's server for links of workers) on a free port of `host`. `door`: the hub's listener;
    None for a new listener."""
    door = door or Door()
    door.hub = Hub("test", door, tuple, tuple)
    server = hub_server(door.hub)
    door.address = f"{host}:{await server.start(host, 0)}"
    watch = asyncio.create_task(door.hub.workers.watch())
    try:
        yield door
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await server.stop(0.1)


@dataclass
class _Answer:
    """Sink that collects the tokens of one request."""

    done: asyncio.Future[list[int]]
    tokens: list[int] = field(default_factory=list)
    last_token_at: float = 0.0

    def accepted(self) -> None:
        """Handle the acceptance of the request: do nothing."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """Handle a refusal of the request: fail the answer."""
        self.done.set_exception(AssertionError(f"refused: {reason} {field} {message}"))

    def token(self, token_id: int, now: float) -> None:
        """Handle one token: collect the token."""
        self.last_token_at = now
        self.output(TokenOutput("", (token_id,)))

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Handle one token of a parsed output: collect the token."""
        self.token(token_id, now)

    def output(self, output: TokenOutput) -> None:
        """Handle an output: collect its tokens, and complete the answer if the output is the last."""
        self.tokens.extend(output.token_ids)
        if output.finish is not None and not self.done.done():
            self.done.set_result(self.tokens)

    def lost(self, why: str) -> None:
        """Handle the loss of the link: fail the answer."""
        if not self.done.done():
            self.done.set_exception(AssertionError(f"lost: {why}"))

    def failed(self, error: BaseException) -> None:
        """Handle a token that could not be stored: fail the answer."""
        if not self.done.done():
            self.done.set_exception(error)


async def greedy(link: WorkerLink, prompt: Sequence[int], count: int) -> list[int]:
    """Return the next `count` tokens after a prompt, decoded greedily over the link."""
    answer = _Answer(asyncio.get_running_loop().create_future())
    sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
    link.submit(SubmittedRequest(EngineRequest("", list(prompt), sampling)), answer)
    return await asyncio.wait_for(answer.done, 240.0)


async def eventually(probe: Callable[[], T | None], what: str, timeout_s: float = 240.0) -> T:
    """Return the first truthy result of `probe`. Raises AssertionError with `what` on timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := probe():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout_s:g} s waiting until {what}")
        await asyncio.sleep(0.05)


async def settled(
    backend: Backend, holds: Callable[[RaySnapshot], bool], what: str, timeout_s: float = 240.0
) -> RaySnapshot:
    """Return the first snapshot of Ray for which `holds` is true. Fails with the last snapshot on timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        snapshot = await backend.observe()
        if holds(snapshot):
            return snapshot
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout_s:g} s waiting until {what}; last seen {snapshot.apps}")
        await asyncio.sleep(0.1)


def apps_of(snapshot: RaySnapshot, model: str) -> list[Observed]:
    """Return the applications of a model on Ray."""
    return [seen for seen in snapshot.apps.values() if seen.model == model]


async def removed(backend: Backend, *models: str) -> None:
    """Delete all applications of these models and wait until the applications are gone."""
    for app, seen in (await backend.observe()).apps.items():
        if seen.model in models:
            await backend.delete(app)
    await settled(backend, lambda s: not any(apps_of(s, model) for model in models), f"{models} are gone")
