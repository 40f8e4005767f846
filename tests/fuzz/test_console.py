"""Fuzz tests of the console: any paths, heads, cookies and bodies, sent by browsers of each role and by other
clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from cluster.gateway.apis.admin.authorization import VERBS
from cluster.gateway.console.pages import read_files
from tests.fuzz.test_public import JSON, bodies, send_and_disconnect
from tests.support.admin import role_key
from tests.support.console import HOST, Browser
from tests.support.fuzz import batches, each, nothing_unexpected
from tests.support.keyed import Keyed, keyed_cluster

pytestmark = pytest.mark.slow

ROLES = ("nobody", "caller", "tenant_admin", "viewer", "operator")
PATHS = ["/", "/console/session", "/console/sign-in", "/console/sign-out", "/console/csp-report"]
PATHS += ["/console/v1/chat/completions", "/console/v1/models", "/console/events", "/console/history"]
PATHS += ["/console", "/console/", "/console/static/", "/console/static/..", "/console/api/", "/console/api/x.y"]
WORDS = ["tenants/acme", "tenants/rival", "tenants/acme/keys/k1", "sim", "acme", "", "x", "*", "é", "\0", "9" * 30]


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[Keyed]:
    """Provide a gateway with API keys for all roles. Each role may sign in to the gateway's console."""
    async with keyed_cluster(tmp_path, gateway="  console: {tenants: true}\n") as keyed:
        yield keyed


@pytest.fixture
async def browsers(keyed: Keyed) -> dict[str, Browser]:
    """Provide a browser for each role."""
    found = {"nobody": Browser(keyed.cluster)}
    for role in ROLES[1:]:
        tenant = "ops" if role in ("operator", "viewer") else "acme"
        key = await role_key(keyed.ledger, tenant, role)
        await keyed.until_known(tenant, key)
        found[role] = Browser(keyed.cluster)
        assert (await found[role].sign_in(key)).status == 204
    return found


def admin_bodies() -> st.SearchStrategy[dict[str, object]]:
    """Return a strategy for the JSON of an admin request: known names with right and wrong values."""
    names = ["name", "parent", "tenant", "key", "page_size", "page_token", "filter", "update_mask", "request_id"]
    names += ["replicas", "target", "document", "role", "validate_only", "start_time", "group_by", "labels", "limits"]
    value = st.sampled_from(WORDS) | JSON
    nested = st.dictionaries(st.sampled_from(names), value, max_size=3)
    return st.dictionaries(st.sampled_from(names), value | nested, max_size=4)


async def test_admin_requests(browsers: dict[str, Browser]) -> None:
    """In each role, any JSON to any admin method is answered or refused, never with a server error."""
    async with nothing_unexpected():
        for batch in batches(st.tuples(st.sampled_from(ROLES), st.sampled_from(list(VERBS)), admin_bodies())):

            async def attack(sent: tuple[str, str, dict[str, object]]) -> None:
                role, verb, body = sent
                reply = await browsers[role].fetch(f"/console/api/{verb}", body)
                assert reply.status in (200, 400, 401, 403, 404, 409, 429, 503), reply.body
                if role == "nobody":
                    assert reply.status == 401

            await each(batch, attack)
            assert (await browsers["viewer"].admin("Tenants.List")).status == 200


def requests(cookies: list[str]) -> st.SearchStrategy[bytes]:
    """Return a strategy for a complete HTTP request whose head is usually correct."""
    paths = [*PATHS, *(f"/console/static/{name}" for name in read_files()), "/console/api/Tenants.List"]
    cookie = st.sampled_from(cookies)
    changed = st.builds(
        lambda text, at, to: text[:at] + to + text[at:], cookie, st.integers(0, 200), st.text(max_size=3)
    )
    value = cookie | changed | st.sampled_from(["", "null", f"http://{HOST}", "same-origin", "cross-site", "gzip", "*"])
    names = ["cookie", "x-csrf-token", "origin", "sec-fetch-site", "content-type", "if-none-match", "host"]
    fields = st.dictionaries(st.sampled_from(names), value | st.text('az09:;=\r\n\0é"', max_size=9), max_size=4)

    def build(method: str, path: str, query: str, fields: dict[str, str], body: bytes) -> bytes:
        named = {"host": HOST, "content-type": "application/json", "content-length": str(len(body))} | fields
        lines = [f"{method} {path}{query} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body

    method = st.sampled_from(["GET", "POST", "POST", "HEAD", "PUT", "OPTIONS", ""])
    query = st.sampled_from(["", "", "?", "?a=1", "?code=x&state=y", "?" + "a=1&" * 200, "?%00", "?seconds=x"])
    return st.builds(build, method, st.sampled_from(paths), query, fields, bodies() | st.just(b""))


async def test_requests(keyed: Keyed, browsers: dict[str, Browser]) -> None:
    """Random requests to any path of the console do no harm. A request may end its own connection, but no other."""
    cookies = [f"{name}={value}" for browser in browsers.values() for name, value in browser.cookies.items()]
    address = keyed.gateway.endpoints["http"]
    async with nothing_unexpected():
        for batch in batches(requests([*cookies, *(browser.csrf for browser in browsers.values())])):
            await each(batch, lambda sent: send_and_disconnect(address, [sent]))
            async with asyncio.timeout(60):
                assert (await browsers["operator"].session())["role"] == "operator"
