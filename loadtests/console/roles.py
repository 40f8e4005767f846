"""The part `roles` of the load test of the console. It counts forbidden requests that the console does not refuse, and
names that the console must not send to a role.

Each role calls each admin method through the console, for its own tenant and for another tenant. The console must
refuse what the admin port refuses (tests/gateway/apis/admin/test_roles.py). Some roles may see one tenant only. The
data that the console sends to these roles is searched for the names of another tenant, of workers and of gateways.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

from cluster.admin.v1 import admin_pb2
from cluster.gateway.apis.admin.authorization import VERBS
from loadtests.console.cluster import log_warnings_only
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from tests.gateway.apis.admin.test_roles import AWAY, OK, OTHER, OWN, ROLES, TABLE, World, request_of
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import bundle_of, sim_engine, until
from tests.support.console import Browser
from tests.support.console_feed import Watcher
from tests.support.keyed import Keyed, bearer, keyed_cluster

GRANTED = (OK, AWAY)
SCOPED = ("tenant_admin", "caller")
REFUSED = "requests of a role for another tenant's page, key or call, or above the role: not refused"
SHOWN = "names of other tenants, workers and gateways in what the console sends to a role of one tenant"
ROWS: Mapping[str, Bound | None] = {REFUSED: Bound("<=", 0), SHOWN: Bound("<=", 0)}


async def measure(stage: Stage) -> list[Figure]:
    """Make the requests of all roles, and return the report's rows."""
    log_warnings_only()
    folder = stage.folder / "roles"
    checkpoint = await asyncio.to_thread(build_checkpoint, "llama", folder / "checkpoint")
    async with keyed_cluster(folder / "gateway", "tenants: [{name: fixed}]\n", "  console: {tenants: true}\n") as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle_of(checkpoint))
        browsers = await _signed_in(keyed)
        answer = await _call(keyed, OTHER)
        await _call(keyed, OWN)
        ledger = keyed.ledger
        keys = {
            (tenant, use): (await asyncio.to_thread(ledger.keys.create, tenant, use)).stored.id
            for tenant in (OWN, OTHER)
            for use in ("rotate", "revoke")
        }
        missed, made = await _unrefused(World(keyed, {}, keys), browsers)
        calls = await _explained(browsers, answer)
        found = await _shown(keyed, browsers)
    stage.report.settings["requests that were not refused"] = missed + calls
    stage.report.settings["names that were shown"] = found
    note = f"{made} requests that must be refused"
    return [
        exact(REFUSED, len(missed) + len(calls), ROWS[REFUSED], "requests", note),
        exact(SHOWN, len(found), ROWS[SHOWN], "names", "events, models and history"),
    ]


async def _signed_in(keyed: Keyed) -> dict[str, Browser]:
    """Return a browser for each role. All browsers are signed in, except the browser of the role `nobody`."""
    browsers = {role: Browser(keyed.cluster) for role in ROLES}
    await role_key(keyed.ledger, OTHER, "caller")
    for role in ROLES[1:]:
        key = await role_key(keyed.ledger, "ops" if role in ("operator", "viewer") else OWN, role)
        async with AdminClient(keyed.gateway.endpoints["admin"], key) as client:
            await until_known(client, "Catalog.List", admin_pb2.ListRequest())
        reply = await browsers[role].sign_in(key)
        if reply.status >= 300:
            raise RuntimeError(f"the role {role} cannot sign in: status {reply.status}")
    return browsers


async def _call(keyed: Keyed, tenant: str) -> str:
    """Make a call of a tenant, and return the id of its answer."""
    key = await keyed.another_key(tenant)
    await keyed.until_known(tenant, key)
    return str((await keyed.cluster.stub.Chat(chat(max_tokens=2), metadata=bearer(key))).id)


async def _unrefused(world: World, browsers: Mapping[str, Browser]) -> tuple[list[str], int]:
    """Return the requests that were not refused as required, and the number of requests that must be refused."""
    missed, made = [], 0
    for verb in VERBS:
        for role in ("nobody", "caller", "viewer", "tenant_admin"):
            for at, tenant in enumerate((OWN, OTHER)):
                if role in ("viewer", "tenant_admin"):
                    expected = TABLE[verb][at][("viewer", "tenant_admin").index(role)]
                else:
                    expected = "UNAUTHENTICATED" if role == "nobody" else "PERMISSION_DENIED"
                if expected in GRANTED:
                    continue
                made += 1
                got = await browsers[role].code(verb, request_of(world, verb, tenant))
                if got != expected:
                    missed.append(f"{role} {verb} {tenant}: {got}, not {expected}")
    return missed, made


async def _explained(browsers: Mapping[str, Browser], answer: str) -> list[str]:
    """Return the roles that may see one tenant only and that could still read another tenant's call by its id."""
    found = []
    for role in SCOPED:
        reply = await browsers[role].admin("Fleet.ExplainRequest", request_id=answer)
        if reply.status < 400:
            found.append(f"{role} Fleet.ExplainRequest {answer}: {reply.status}")
    return found


async def _shown(keyed: Keyed, browsers: Mapping[str, Browser]) -> list[str]:
    """Return the names that the console wrongly sends to roles with access to one tenant: names of other tenants,
    gateways and workers. The console's events, models and history are searched."""
    hub = keyed.gateway.hub
    foreign = {OTHER, "fixed", hub.gateway_id, *(worker.identity.worker_id for worker in keyed.cluster.workers)}
    found = []
    for role in SCOPED:
        browser = browsers[role]
        texts = {
            "events": json.dumps(await _state(keyed, browser)),
            "models": (await browser.fetch("/console/v1/models")).body.decode(),
            "history": (await browser.fetch("/console/history?series=tokens")).body.decode(),
        }
        if OWN not in texts["events"]:
            raise RuntimeError(f"the events of the role {role} do not have its own tenant")
        found += [f"{role} {place}: {name}" for place, text in texts.items() for name in foreign if name in text]
        reply = await browser.fetch(f"/console/history?series=tokens&tenant={OTHER}")
        if reply.status < 400:
            values = [value for series in reply.json["series"].values() for value in series if value]
            found += [f"{role} history of {OTHER}: {reply.status}"] if values else []
    return found


async def _state(keyed: Keyed, browser: Browser) -> dict[str, object]:
    """Return the first document of a browser's events."""
    host, port = keyed.gateway.endpoints["http"].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 24)
    cookie = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    writer.write(f"GET /console/events HTTP/1.1\r\nhost: {browser.host}\r\ncookie: {cookie}\r\n\r\n".encode())
    watcher = Watcher(reader, writer)
    task = asyncio.create_task(watcher.run())
    try:
        await until(lambda: bool(watcher.document) or watcher.ended, "the events begin")
        return watcher.document
    finally:
        task.cancel()
        writer.close()
        await asyncio.gather(task, return_exceptions=True)
