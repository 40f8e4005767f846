"""Authorization of the console: every admin method with every role gives the same answer as on the admin port."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from google.protobuf import json_format

from cluster.admin.v1 import admin_pb2
from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.apis.admin.authorization import VERBS
from tests.gateway.apis.admin.test_roles import (
    KEYS,
    NO,
    OTHER,
    OWN,
    READ,
    ROLES,
    TABLE,
    World,
    request_of,
)
from tests.ledger.samples import record
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.console import Browser
from tests.support.keyed import keyed_cluster


@dataclass
class Console:
    """A gateway with two tenants, and one browser for each role."""

    world: World
    browsers: dict[str, Browser]


@pytest.fixture(scope="module")
async def console(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Console]:
    """Start a gateway at which all roles may sign in, and sign in one browser for each role."""
    folder = tmp_path_factory.mktemp("console-roles")
    async with keyed_cluster(folder, "tenants: [{name: fixed}]\n", "  console: {tenants: true}\n") as keyed:
        keyed.gateway.directory.apply_catalog([CatalogEntry(name="sim", state=ModelState.LOADING)])
        address, ledger = keyed.gateway.endpoints["admin"], keyed.ledger
        keys = {
            role: await role_key(ledger, "ops" if role in ("operator", "viewer") else OWN, role) for role in ROLES[1:]
        }
        await role_key(ledger, OTHER, "caller")
        ids = {
            (tenant, use): ledger.keys.create(tenant, use).stored.id
            for tenant in (OWN, OTHER)
            for use in ("rotate", "revoke")
        }
        ledger.usage.insert([record("a", tenant=OWN), record("b", tenant=OTHER)])
        browsers = {role: Browser(keyed.cluster) for role in ROLES}
        for role in ROLES[1:]:
            async with AdminClient(address, keys[role]) as client:
                await until_known(client, "Catalog.List", admin_pb2.ListRequest())
            assert (await browsers[role].sign_in(keys[role])).status == 204
        yield Console(World(keyed, {}, ids), browsers)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("role", ROLES)
async def test_each_role_at_each_verb(console: Console, verb: str, role: str) -> None:
    """Each method is granted or refused to each role as on the admin port, for the viewer's own tenant and for another
    tenant."""
    expected = {"nobody": ("UNAUTHENTICATED",) * 2, "caller": (NO, NO)}.get(role)
    if expected is None:
        at = ("viewer", "tenant_admin", "operator").index(role)
        expected = TABLE[verb][0][at], TABLE[verb][1][at]
    browser = console.browsers[role]
    got = [await browser.code(verb, request_of(console.world, verb, tenant)) for tenant in (OWN, OTHER)]
    assert tuple(got) == expected


@pytest.mark.parametrize("verb", [verb for verb, rule in TABLE.items() if rule in (READ, KEYS)])
async def test_another_tenant_reads_as_none(console: Console, verb: str) -> None:
    """A tenant administrator gets the same answer, byte for byte, for the objects of another tenant and for the objects
    of a tenant that does not exist."""
    ghost = "ghost"
    console.world.keys |= {(ghost, use): console.world.keys[OTHER, use] for use in ("rotate", "revoke")}
    there, absent = [
        await console.browsers["tenant_admin"].admin(
            verb, **json_format.MessageToDict(request_of(console.world, verb, tenant), preserving_proto_field_name=True)
        )
        for tenant in (OTHER, ghost)
    ]
    assert there.status == absent.status == 404
    assert there.body.replace(OTHER.encode(), ghost.encode()) == absent.body


async def test_lists_end_at_the_own_tenant(console: Console) -> None:
    """If a request names no tenant, a tenant administrator gets the rows of its own tenant, and a viewer gets the rows
    of all tenants."""
    for role, tenants in (("tenant_admin", {OWN}), ("viewer", {OWN, OTHER, "ops", "fixed"})):
        browser = console.browsers[role]
        found = (await browser.admin("Tenants.List")).json
        assert {tenant["name"].removeprefix("tenants/") for tenant in found["tenants"]} == tenants
        lines = (await browser.admin("Usage.Export")).body.splitlines()
        records = [record for line in lines for record in json.loads(line)["records"]]
        assert {record["tenant"] for record in records} == tenants & {OWN, OTHER}


@pytest.mark.parametrize("role", ROLES)
async def test_the_session_says_what_the_role_may(console: Console, role: str) -> None:
    """The session document has the role, the tenant and the rights. The page shows its buttons by these rights."""
    session = await console.browsers[role].session()
    rights = {right for right, is_granted in session["may"].items() if is_granted}
    if role == "nobody":
        assert (session["signed_in"], session["role"], session["version"], rights) == (False, "", "", set())
        return
    assert (session["signed_in"], session["role"]) == (True, role)
    assert session["tenant"] == ("ops" if role in ("operator", "viewer") else OWN)
    assert session["actor"].startswith("key:")
    assert rights == {"operator": {"fleet", "tenants", "keys"}, "tenant_admin": {"keys"}}.get(role, set())
