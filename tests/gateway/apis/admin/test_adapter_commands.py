"""Tests of the `headrace adapters` commands with a real gateway and a real controller. Ray is a fake."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

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
from cluster.wire.bundle import Bundle
from tests.support.adapter_files import NamedFiles, digest_of
from tests.support.calls import chat
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.fake_ray import FakeRay
from tests.support.shell import headrace

TEXT = LOOPBACK.replace('"sim:///nowhere"', '"sim:///nowhere", aliases: [default], adapters: {own: /own}')


@dataclass
class Site:
    """A gateway with a controller and two workers, and the files of each worker's node."""

    cluster: TestCluster
    files: tuple[NamedFiles, NamedFiles]

    async def adapters(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a `headrace adapters` command with these arguments."""
        admin = self.cluster.gateway.endpoints["admin"]
        return await asyncio.to_thread(headrace, "adapters", *arguments, "--admin", admin)

    def names(self) -> list[str]:
        """Return the names of the model's adapters at the gateway."""
        return [spec.name for spec in self.cluster.gateway.directory.models[0].adapters.specs]


@pytest.fixture
async def site(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Site]:
    """Run a gateway with a controller and two workers. The catalog entry of the model declares the adapter `own`."""
    async with running_cluster(tmp_path / "gateway", TEXT) as cluster:
        models, published = DesiredModels(), PublishedCatalog()
        catalog = EditableCatalog(
            parse(TEXT),
            models,
            CatalogOverlayFile(tmp_path / "catalog.json", "one"),
            lambda config: settings_of(config, gateways=["g:1"], local=True),
            by_file=False,
        )
        links = ControllerLinks(
            controller_id="c",
            gateways=[cluster.gateway.endpoints["link"]],
            tls=None,
            bundles=lambda digest: None,
            verbs=catalog_verbs(StoredCatalogService(catalog, models, published)),
        )
        controller = Controller(FakeRay(), links, models, published)
        parts = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
        site = Site(cluster, (NamedFiles(), NamedFiles()))
        try:
            for files in site.files:
                engine = sim_engine(checkpoint, decode_ms=1, max_loras=2, max_cpu_loras=4)
                await cluster.add_worker(engine, bundle, adapter_files=files)
            known = cluster.gateway.directory.models[0].adapters
            await until(lambda: known.find("own") is not None and known.view("own").ready == 2, "`own` is loaded")
            yield site
        finally:
            for files in site.files:
                files.may_fetch.set()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)


@pytest.mark.slow
async def test_an_adapter_is_loaded_listed_and_unloaded(site: Site) -> None:
    """`load --wait` returns once all workers have the adapter. The adapter is then listed and can be called. `unload`
    removes it. The adapter `own` of the catalog entry stays, and no call of the model fails meanwhile."""
    calls = [asyncio.ensure_future(site.cluster.stub.Chat(chat(max_tokens=100, ignore_eos=True))) for _ in range(2)]
    done = await site.adapters("load", "default", "a", "/a", "--tenant", "default", "--pinned", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    (loaded,) = json.loads(done.stdout)
    assert (loaded["model"], loaded["state"], loaded["ready_workers"]) == ("sim", "READY", 2)
    assert (loaded["digest"], loaded["tenants"], loaded["pinned"]) == (digest_of("/a"), ["default"], True)
    assert (await site.cluster.stub.Chat(chat(model="sim:a"), timeout=20)).model == "sim:a"
    done = await site.adapters("list", "default")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[:4] for line in done.stdout.splitlines()]
    assert rows[1:] == [["sim", "a", "READY", "2"], ["sim", "own", "READY", "2"]]
    done = await site.adapters("unload", "sim", "a", "--reason", "no longer used")
    assert (done.returncode, done.stdout.strip()) == (0, "unloaded: sim:a")
    await until(lambda: site.names() == ["own"], "the gateway has the new catalog")
    await asyncio.gather(*calls)


@pytest.mark.slow
async def test_a_worker_that_cannot_load_it_is_named(site: Site) -> None:
    """If one worker cannot load an adapter, `load --wait` ends with exit code 1 and the reason. The other workers serve
    the adapter."""
    site.files[0].broken["/a"] = "adapter_config.json is missing"
    done = await site.adapters("load", "sim", "a", "/a", "--wait", "--json")
    assert done.returncode == 1, done.stderr
    (loaded,) = json.loads(done.stdout)
    (failure,) = loaded["failures"]
    assert (loaded["state"], loaded["ready_workers"], loaded["reason"]) == ("READY", 1, site.files[0].broken["/a"])
    assert failure["worker_id"] == site.cluster.workers[0].identity.worker_id
    assert (await site.cluster.stub.Chat(chat(model="sim:a"), timeout=20)).model == "sim:a"


@pytest.mark.slow
async def test_a_wrong_request_is_refused(site: Site) -> None:
    """An invalid command ends with an exit code and the reason, and changes nothing."""
    for arguments, code, error in (
        (("load", "sim", "own", "/a"), 1, "is declared in the model's entry"),
        (("load", "sim", "a:b", "/a"), 2, "adapter: 'a:b' must be letters"),
    ):
        done = await site.adapters(*arguments)
        assert (done.returncode, error in " ".join(done.stderr.split())) == (code, True), done.stderr
    assert site.names() == ["own"]
