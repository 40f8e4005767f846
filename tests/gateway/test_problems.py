"""A gateway lists the faults that it can see, and what the controller reports, while they last."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState, VersionShare
from cluster.controller.links import ControllerLinks
from cluster.gateway.problems import RecentOutcomes
from cluster.gateway.server import Gateway
from cluster.observe.metrics import Metrics
from cluster.policy.problems import Problem
from cluster.wire.bundle import Bundle
from cluster.wire.certificate_expiry import CertificateExpiry
from tests.support.calls import chat
from tests.support.certificates import Authority
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.keyed import keyed_text


def kinds(gateway: Gateway) -> Sequence[str]:
    """Search, and return the kinds of what is found, without regard to how long it has lasted."""
    return [finding.kind for finding in gateway.problems.findings()]


def listed(gateway: Gateway) -> set[str]:
    """Search, and return the kinds of the listed problems."""
    gateway.problems.search()
    return {problem.kind for problem in gateway.problems.current}


async def test_a_sound_cluster_has_no_problem(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway with a worker that answers lists nothing, also after the worker has left in order."""
    worker = await cluster.add_worker(sim_engine(checkpoint), bundle)
    await cluster.stub.Chat(chat())
    assert kinds(cluster.gateway) == []
    await worker.end.drain(5)
    await worker.stop()
    await until(lambda: not cluster.gateway.hub.links, "it has left")
    assert {"worker_lost", "workers_crash"}.isdisjoint(kinds(cluster.gateway))


async def test_lost_workers(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A lost worker is listed until another of its name is back, and a model whose workers end three times within a
    quarter of an hour is listed as one whose workers crash."""
    gateway = cluster.gateway
    gateway.worker_events.apply_catalog([CatalogEntry("sim", state=ModelState.READY, replicas_desired=1)])
    for number in range(1, 4):
        worker = await cluster.add_worker(sim_engine(checkpoint), bundle)
        assert "model_without_workers" not in kinds(gateway)
        await worker.stop()
        await until(lambda: not gateway.hub.links, "it is lost")
        found = kinds(gateway)
        assert found.count("worker_lost") == number
        assert ("workers_crash" in found) is (number == 3)
        assert "model_without_workers" in found
    gateway.problems.search()
    text = {problem.row["summary"] for problem in gateway.problems.current}
    assert "workers of model sim end again and again" in text


async def test_models(cluster: TestCluster) -> None:
    """A model that cannot start, an invalid entry and a quarantined version are listed with the controller's
    reasons."""
    cluster.gateway.worker_events.apply_catalog(
        [
            CatalogEntry("broken", state=ModelState.FAILED, state_reason="no such folder"),
            CatalogEntry(
                "canary",
                state=ModelState.READY,
                versions=(VersionShare("v1"), VersionShare("v2", quarantined=True, state_reason="too slow")),
            ),
        ]
    )
    cluster.gateway.problems.search()
    problems = {one.kind: one for one in cluster.gateway.problems.current}
    assert (problems["model_failed"].object, problems["model_failed"].cause) == ("broken", "no such folder")
    assert (problems["version_quarantined"].object, problems["version_quarantined"].cause) == ("canary@v2", "too slow")


async def test_what_the_controller_reports(cluster: TestCluster) -> None:
    """The controller's problems are listed while it is connected. Then its absence is a problem."""
    links = ControllerLinks(
        controller_id="c", gateways=[cluster.gateway.endpoints["link"]], tls=None, bundles=lambda _: None, idle_s=0.02
    )
    dialling = asyncio.create_task(links.run())
    try:
        links.publish([])
        links.set_problems([Problem("ray_away", "local", "no answer", 5.0)])
        await until(lambda: "ray_away" in listed(cluster.gateway), "the problem has come")
        assert abs(cluster.gateway.hub.controller.clock_skew_s) < 60
        links.set_problems([])
        await until(lambda: "ray_away" not in listed(cluster.gateway), "the problem is over")
        links.set_problems([Problem("ray_away", "local", "no answer", 5.0)])
        await until(lambda: "ray_away" in listed(cluster.gateway), "the problem has come")
        assert not links.unreachable_gateways(time.monotonic())
        assert links.unreachable_gateways(time.monotonic() + 60)[0][1] == "it is frozen"
    finally:
        dialling.cancel()
        await asyncio.gather(dialling, return_exceptions=True)
    await until(lambda: "ray_away" not in listed(cluster.gateway), "nobody reports it any longer")
    assert links.unreachable_gateways(time.monotonic() + 60)[0][1] == "it has ended, or cannot be reached"
    await until(lambda: "controller_away" in listed(cluster.gateway), "its absence is listed")


async def test_stores_and_files(tmp_path: Path) -> None:
    """A database that is gone, a spool that cannot be written, an invalid file and an expired certificate are listed,
    and no longer when they are mended."""
    folder = tmp_path / "gateway"
    async with running_cluster(folder, keyed_text(tmp_path / "files")) as cluster:
        gateway = cluster.gateway
        assert set(kinds(gateway)) == set()
        gateway.problems.certificates = CertificateExpiry([Authority(tmp_path / "ca").issue("gateway").cert_file])
        gateway._config_state.problems = ("models.0.source: is missing",)
        assert set(kinds(gateway)) == {"certificate_expires", "config_refused"}
        gateway.problems.certificates = CertificateExpiry()
        gateway._config_state.problems = ()
        assert set(kinds(gateway)) == set()


@pytest.mark.slow
async def test_a_database_that_is_gone(tmp_path: Path) -> None:
    """A database that cannot be read is listed within seconds, with its error, and no longer once it answers."""
    files = tmp_path / "files"
    async with running_cluster(tmp_path / "gateway", keyed_text(files)) as cluster:
        ledger = files / "ledger.db"
        shutil.copy(ledger, files / "kept.db")
        ledger.write_bytes(b"this is no database" * 1000)
        await until(lambda: "database_away" in listed(cluster.gateway), "it is listed")
        shutil.copy(files / "kept.db", ledger)
        await until(lambda: "database_away" not in listed(cluster.gateway), "it is listed no longer")


def test_failing_and_slow_calls() -> None:
    """Calls that fail fourteen times as fast as the budget allows are listed; few failures among many calls, or among
    few calls, are not."""
    from cluster.gateway.models.known_model import KnownModel

    metrics = Metrics("c")
    recent = RecentOutcomes(metrics)
    models = [KnownModel(CatalogEntry("m", slo_ttft_s=1.0, slo_target=0.9), in_catalog=True)]

    def count(now: float, calls: int, failed: int, late: int) -> list[str]:
        metrics.count("requests_total", "m", "t", "grpc", "ok", by=calls - failed)
        metrics.count("requests_total", "m", "t", "grpc", "worker_lost", by=failed)
        metrics.count("slo_calls_total", "m", "met", by=calls - late)
        metrics.count("slo_calls_total", "m", "late_first_token", by=late)
        return [finding.kind for finding in recent.findings(models, now)]

    assert count(0, 1000, 0, 0) == []
    assert count(15, 9, 9, 9) == []
    assert count(30, 1000, 5, 100) == []
    assert count(400, 1000, 0, 0) == []
    assert count(800, 1000, 100, 0) == ["failing_calls"]
    assert count(1200, 1000, 0, 990) == ["slow_calls"]
    assert count(1600, 1000, 0, 0) == []


async def test_the_overview_shows_problems_to_operators_alone(cluster: TestCluster) -> None:
    """The overview has each problem with its remedy. A viewer of one tenant sees none."""
    cluster.gateway.worker_events.apply_catalog([CatalogEntry("m", state=ModelState.FAILED, state_reason="no weights")])
    cluster.gateway.problems.search()
    document = await cluster.gateway.live.document("")
    (row,) = document["problems"]
    assert (row["id"], row["hurts"], row["cause"]) == ("model_failed:m", "callers", "no weights")
    assert row["remedy"]
    assert (await cluster.gateway.live.document("acme"))["problems"] == []
    assert list(cluster.gateway.problems.gauges()) == [("problem", ("model_failed", "m", "callers"), 1.0)]
