"""Live data of a real gateway over HTTP: what each role sees, and streams that end when the key is revoked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.wire.bundle import Bundle
from tests.support.admin import role_key
from tests.support.cluster import sim_engine
from tests.support.console import Browser
from tests.support.http import Wire, chat_body
from tests.support.keyed import Keyed, keyed_cluster

OWN, OTHER = "acme", "rival"
ONE_TENANT = ("caller", "tenant_admin")


@pytest.fixture
async def keyed(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Provide a gateway with one worker, at which each of two tenants has made a call."""
    async with keyed_cluster(tmp_path, gateway="  console: {tenants: true}\n") as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint), bundle)
        for tenant in (OWN, OTHER):
            key = await keyed.key(tenant, models=["*"])
            reply = await keyed.fetch("/v1/chat/completions", chat_body(), key=key, x_request_id=f"call-of-{tenant}")
            assert reply.status == 200
        yield keyed


async def signed_in(keyed: Keyed, role: str) -> Browser:
    """Return the browser of a person with a role."""
    tenant = OWN if role in ONE_TENANT else "ops"
    key = await role_key(keyed.ledger, tenant, role)
    await keyed.until_known(tenant, key)
    browser = Browser(keyed.cluster)
    assert (await browser.sign_in(key)).status == 204
    return browser


@asynccontextmanager
async def events_of(keyed: Keyed, browser: Browser) -> AsyncIterator[Wire]:
    """Open the event stream of a browser. Yields the connection after the head of the response."""
    wire = await Wire.open(keyed.cluster)
    try:
        cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        wire.ask("/console/events", host=browser.host, cookie=cookie)
        status, headers = await wire.head()
        assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
        yield wire
    finally:
        await wire.close()


async def first_state(wire: Wire) -> Any:
    """Return the document of the first event `state`."""
    text = ""
    async with asyncio.timeout(60):
        while True:
            text += (await wire.chunk()).decode()
            *blocks, text = text.split("\n\n")
            for block in blocks:
                if block.startswith("event: state\n"):
                    return json.loads(block.partition("data: ")[2])


@pytest.mark.parametrize("role", ["caller", "tenant_admin", "viewer", "operator"])
async def test_each_role_sees_its_tenants(keyed: Keyed, role: str) -> None:
    """Callers and tenant administrators see the calls of their own tenant, and no workers or gateways. Operators and
    viewers see everything."""
    async with events_of(keyed, await signed_in(keyed, role)) as wire:
        state = await first_state(wire)
    tenants = {call["tenant"] for call in state["calls"]}
    if role in ONE_TENANT:
        assert tenants == {OWN}
        assert OTHER not in json.dumps(state)
        assert not any(state.get(name) for name in ("workers", "gateways", "scaling"))
        assert "sim-w" not in json.dumps(state)
    else:
        assert tenants == {OWN, OTHER}
        assert [worker["model"] for worker in state["workers"]] == ["sim"]


@pytest.mark.parametrize("role", ONE_TENANT)
async def test_another_tenants_history_is_unknown(keyed: Keyed, role: str) -> None:
    """A query for the history of another tenant gets the same answer as a query for a tenant that does not exist."""
    browser = await signed_in(keyed, role)
    assert (await browser.fetch(f"/console/history?series=tokens&tenant={OWN}")).status == 200
    there, absent = [
        await browser.fetch(f"/console/history?series=tokens&tenant={tenant}") for tenant in (OTHER, "ghost")
    ]
    assert there.status == absent.status == 404
    assert there.body.replace(OTHER.encode(), b"ghost") == absent.body


@pytest.mark.parametrize("path", ["/console/events", "/console/history"])
async def test_nobody_sees_nothing(keyed: Keyed, path: str) -> None:
    """A request without a session gets no live data."""
    assert (await Browser(keyed.cluster).fetch(path)).status == 401


@pytest.mark.slow
async def test_a_revoked_key_ends_its_events(keyed: Keyed) -> None:
    """The event stream of a session ends properly when the session's key is revoked."""
    browser = await signed_in(keyed, "viewer")
    key_id = (await browser.session())["actor"].removeprefix("key:")
    async with events_of(keyed, browser) as wire:
        await first_state(wire)
        await asyncio.to_thread(keyed.ledger.keys.revoke, "ops", key_id)
        async with asyncio.timeout(60):
            while await wire.chunk():
                pass
    assert (await browser.fetch("/console/history")).status == 401


async def test_open_events_do_not_delay_a_stop(keyed: Keyed) -> None:
    """A stopping gateway ends open event streams at once, so it need not wait for the drain time of the port."""
    console = keyed.gateway.console
    assert console is not None
    async with events_of(keyed, await signed_in(keyed, "operator")) as wire:
        await first_state(wire)
        await console.close()
        async with asyncio.timeout(60):
            while await wire.chunk():
                pass
            await keyed.gateway.ports.http.stop(3600)
