"""Tests of all changes of a model under load, on a real Ray and with replicas in this process.

A model is added beside others, gets canaries that are rolled back, is replaced, gets a canary that is promoted, and is
removed. No call fails and no stream is cut.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.api.types import CatalogEntry
from cluster.config.document import parse
from cluster.controller.catalog_overlay import CatalogOverlayFile
from cluster.controller.catalog_service import StoredCatalogService
from cluster.controller.catalog_verbs import catalog_verbs
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.editable_catalog import EditableCatalog
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.controller.replica_settings import settings_of
from cluster.controller.retired_apps import RetiredApps
from cluster.ray.backend import Backend, ChildBackend
from tests.support.calls import Answer, chat, text_of
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, running_cluster, until
from tests.support.live_replicas import LiveReplicas
from tests.support.serving import removed

CALLERS = 6
START_S = 240.0
FILE = "{api_version: headrace/v1, name: test, models: []}"


@dataclass
class Load:
    """Callers that each begin a new call as soon as their last call has ended, until the model is removed."""

    cluster: TestCluster
    ended: int = 0
    failed: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def begin(self) -> None:
        """Start the callers."""
        self._tasks = [asyncio.create_task(self._caller(number)) for number in range(CALLERS)]

    async def _caller(self, number: int) -> None:
        for turn in itertools.count():
            tokens = 20 + 60 * ((number + turn) % 4)
            received, finish, text = 0, "", ""
            try:
                async for chunk in self.cluster.stub.StreamChat(chat(model="m", max_tokens=tokens, ignore_eos=True)):
                    received = chunk.usage.completion_tokens or received
                    text += text_of([chunk])
                    finish = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), finish)
            except grpc.aio.AioRpcError as error:
                answer = Answer(error)
                if answer.reason != "MODEL_NOT_FOUND":
                    self.failed.append(repr(answer))
                return
            if (received, finish) != (tokens, "length"):
                self.failed.append(f"{received} of {tokens} tokens, then {finish!r}")
            self.texts.append(text)
            self.ended += 1

    async def more(self, calls: int) -> None:
        """Wait until `calls` more calls have ended."""
        goal = self.ended + calls
        await until(lambda: self.ended >= goal or bool(self.failed), f"{calls} more calls end", START_S)
        assert not self.failed

    async def over(self) -> None:
        """Wait until every caller has got MODEL_NOT_FOUND."""
        await asyncio.wait_for(asyncio.gather(*self._tasks), START_S)
        assert not self.failed


class Operator:
    """An operator that applies catalog entries to a cluster, and waits until the gateway shows their effect."""

    def __init__(self, cluster: TestCluster, service: StoredCatalogService, folder: Path) -> None:
        self._cluster = cluster
        self._verbs = catalog_verbs(service)
        self._folder = folder

    def source(self, **parameters: object) -> str:
        """Return the source of a simulated engine with these parameters."""
        return f"sim://{self._folder}?" + "&".join(f"{name}={value}" for name, value in parameters.items())

    async def apply(self, *entries: dict[str, Any], prune: bool = False) -> None:
        """Send an Apply request as the admin API does."""
        request = pb.ApplyRequest(document=json.dumps({"models": entries}).encode(), prune=prune)
        await self._verbs["Catalog.Apply"](request.SerializeToString(), "test")

    async def ask(self, verb: str, request: Any) -> None:
        """Send an admin request."""
        await self._verbs[verb](request.SerializeToString(), "test")

    def entry(self, model: str = "m") -> CatalogEntry | None:
        """Return the catalog entry that the gateway has for a model; None if it has none."""
        known = self._cluster.gateway.directory.find(model)
        return None if known is None else known.entry

    def workers(self, model: str = "m") -> dict[str, str]:
        """Return the versions of the workers that accept calls, by incarnation."""
        known = self._cluster.gateway.directory.find(model)
        links = [] if known is None else [link for link in known.links.values() if known.takes_calls(link)]
        return {link.identity.incarnation: link.identity.version for link in links if link.free.sequences}

    async def serve(self, *versions: str, model: str = "m") -> dict[str, str]:
        """Wait until workers of exactly these versions are linked and accept calls. Return the version of each of these
        workers, by its incarnation."""

        def are_linked() -> bool:
            known = self._cluster.gateway.directory.find(model)
            linked = [] if known is None else sorted(link.identity.version for link in known.links.values())
            return linked == sorted(versions) and len(self.workers(model)) == len(versions)

        await until(are_linked, f"{model} has workers of {versions}", START_S)
        return self.workers(model)


@asynccontextmanager
async def operating(cluster: TestCluster, backend: Backend, folder: Path) -> AsyncIterator[Operator]:
    """Run a controller with a catalog service, linked to the gateway."""
    address = cluster.gateway.endpoints["link"]
    links = ControllerLinks(controller_id="test", gateways=[address], tls=None, bundles=lambda _: None)
    models, published = DesiredModels(), PublishedCatalog()
    catalog = EditableCatalog(
        parse(FILE),
        models,
        CatalogOverlayFile(folder / "catalog.json", "one"),
        lambda config: settings_of(config, gateways=[address], local=True),
        by_file=False,
    )
    service = StoredCatalogService(catalog, models, published)
    controller = Controller(backend, links, models, published, RetiredApps(60.0), keep_overrides=catalog.store)
    tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
    try:
        yield Operator(cluster, service, build_checkpoint("llama", folder / "llama"))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
async def test_a_model_changes_under_load_on_ray(backend: ChildBackend, tmp_path: Path) -> None:
    """While a model is changed step by step on a real Ray cluster, no call fails."""
    await changes_under_load(backend, tmp_path)
    await removed(backend, "m", "n")


@pytest.mark.thorough
@pytest.mark.slow
async def test_a_model_changes_under_load(tmp_path: Path) -> None:
    """Under load, no call fails while a model goes through every kind of change. The replicas run in the test's
    process."""
    replicas = LiveReplicas()
    try:
        await changes_under_load(replicas, tmp_path)
    finally:
        await replicas.shutdown()
        await replicas.close()


async def changes_under_load(backend: Backend, tmp_path: Path) -> None:
    """Change a model step by step while callers stream. Check that each step keeps the workers of models that it does
    not change."""
    async with running_cluster(tmp_path / "gateway") as cluster, operating(cluster, backend, tmp_path) as operator:
        load = Load(cluster)
        m: dict[str, Any] = {"name": "m", "source": operator.source(decode_ms=3)}
        await operator.apply(m)
        first = await operator.serve("v1")
        load.begin()
        await load.more(CALLERS)

        # another model is added
        await operator.apply({"name": "n", "source": operator.source(decode_ms=3)})
        beside = await operator.serve("v1", model="n")
        assert operator.workers() == first

        # a canary gets calls and is rolled back by hand
        canary = {"version": "v2", "weight": 0.5, "source": operator.source(decode_ms=4), "rollback": {"ttft_ratio": 0}}
        await operator.apply({**m, "canary": canary})
        assert first.items() <= (await operator.serve("v1", "v2")).items()
        await load.more(4 * CALLERS)
        counted = {tally.version: tally.calls for tally in cluster.gateway.scheduler.canaries.tallies()}
        assert min(counted["v1"], counted["v2"]) > 0
        await operator.ask("Catalog.Rollback", pb.RollbackRequest(name="m", reason="by hand"))
        assert await operator.serve("v1") == first

        # a canary with late first tokens is rolled back automatically
        slow = {"version": "v3", "weight": 0.5, "source": operator.source(decode_ms=3, prefill_tokens_per_s=100)}
        await operator.apply({**m, "canary": slow})
        await operator.serve("v1", "v3")
        assert await operator.serve("v1") == first
        shown = operator.entry()
        assert shown is not None
        assert "rolled back by itself" in shown.versions[1].state_reason

        # a changed entry replaces the running replicas
        changed = {"name": "m", "source": operator.source(decode_ms=2)}
        await operator.apply(changed)
        await until(
            lambda: not operator.workers().keys() & first.keys() and bool(operator.workers()), "it is replaced", START_S
        )
        second = await operator.serve("v1")
        await load.more(CALLERS)

        # a promoted canary keeps its worker
        await operator.apply({**changed, "canary": canary})
        both = await operator.serve("v1", "v2")
        await operator.ask("Catalog.Promote", pb.PromoteRequest(name="m"))
        assert (await operator.serve("v2")).items() <= both.items()
        assert second.items() <= both.items()
        await load.more(CALLERS)

        # the model is removed: its streams end, and new calls get MODEL_NOT_FOUND
        await operator.apply({"name": "n", "source": operator.source(decode_ms=3)}, prune=True)
        await load.over()
        await until(lambda: operator.entry() is None, "the gateway has no entry of it", START_S)
        assert operator.workers("n") == beside
        print(f"{load.ended} calls, none failed")
