"""Tests of how `up` waits for the states of models and reports them, with a scripted gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from cluster.admin.v1 import admin_pb2
from cluster.cli.local import model_states
from cluster.cli.target.access import Access
from cluster.cli.target.admin_client import Admin
from tests.support.scripted_gateway import ScriptedGateway
from tests.support.serving import eventually


def entry(name: str, state: str, reason: str = "") -> admin_pb2.CatalogEntry:
    """Return a catalog entry."""
    return admin_pb2.CatalogEntry(name=name, state=state, state_reason=reason)


@pytest.fixture
def admin(gateway: ScriptedGateway) -> Iterator[Admin]:
    """Client of the scripted gateway's admin API."""
    with closing(Admin(Access(gateway.endpoint))) as client:
        yield client


async def test_it_waits_until_every_model_is_settled(gateway: ScriptedGateway, admin: Admin) -> None:
    """`wait_until_settled` shows the states of the wanted models until each of them is READY, IDLE or FAILED."""
    shown: list[str] = []
    waiting = asyncio.create_task(model_states.wait_until_settled(admin, ["a", "b"], shown.append))
    await eventually(lambda: "waiting for the controller" in shown, "there is no entry yet")
    gateway.script.entries = [entry("a", "READY"), entry("b", "LOADING")]
    await eventually(lambda: "a ready   b loading" in shown, "both are shown")
    gateway.script.entries = [entry("a", "IDLE"), entry("b", "FAILED", "no such file")]
    assert [(one.name, one.state) for one in await waiting] == [("a", "IDLE"), ("b", "FAILED")]


async def test_only_what_the_controller_has_reported_counts(gateway: ScriptedGateway, admin: Admin) -> None:
    """Entries that the gateway has from an earlier run, before the controller's first report, end no wait."""
    gateway.script.entries, gateway.script.catalog_age_s = [entry("a", "FAILED", "of the last run")], -1
    shown: list[str] = []
    waiting = asyncio.create_task(model_states.wait_until_settled(admin, ["a"], shown.append))
    await eventually(lambda: "waiting for the controller" in shown, "the old entry is not shown")
    gateway.script.entries, gateway.script.catalog_age_s = [entry("a", "READY")], 0.1
    assert [one.state for one in await waiting] == ["READY"]


async def test_new_reasons_are_reported_once(
    gateway: ScriptedGateway, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each new reason for a model's state is reported once. A reason that resolves by itself is not reported."""
    monkeypatch.setattr(model_states, "WATCH_S", 0.02)
    gateway.script.entries = [entry("a", "READY", "1 of 2 replicas serve")]
    reports: list[str] = []
    watch = asyncio.create_task(model_states.report_reasons(admin, reports.append))
    await asyncio.sleep(0.3)
    gateway.script.entries = [entry("a", "READY", "2 of 3 replicas serve; an engine ended")]
    await eventually(lambda: bool(reports), "the end is reported")
    await asyncio.sleep(0.1)
    assert reports == ["a is ready: an engine ended"]
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch


async def test_a_silent_gateway_may_have_workers(gateway: ScriptedGateway, admin: Admin) -> None:
    """`has_no_workers` is true if the gateway lists no worker, and false if the gateway does not answer."""
    assert await model_states.has_no_workers(admin)
    gateway.script.workers = [admin_pb2.Worker(worker_id="w")]
    assert not await model_states.has_no_workers(admin)
    gateway.stop()
    assert not await model_states.has_no_workers(admin)
