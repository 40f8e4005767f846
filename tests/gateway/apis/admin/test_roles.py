"""Authorization on the admin port: every method with every role, and attempts to exceed a role."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from cluster.admin.v1 import adapters_pb2, admin_pb2, catalog_pb2, routing_pb2, scaling_pb2, tenants_pb2, usage_pb2
from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.apis.admin.authorization import VERBS
from cluster.policy.tenants.identity import admin_token
from cluster.policy.tenants.policy import GuardRule, Retention, TenantLimits, TenantPolicy
from tests.ledger.samples import record
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.keyed import SECRET, Keyed, eventually, keyed_cluster
from tests.support.loop_clock import LoopClock

OWN, OTHER = "acme", "rival"
ROLES = ("nobody", "caller", "viewer", "tenant_admin", "operator")


class World:
    """A gateway, two tenants, and one client for each role. The roles operator and viewer belong to the tenant ops, the
    other roles to the tenant acme."""

    def __init__(self, keyed: Keyed, clients: dict[str, AdminClient], keys: dict[tuple[str, str], str]) -> None:
        self.keyed = keyed
        self.clients = clients
        self.keys = keys
        """For each tenant, the id of a key to rotate and the id of a key to revoke, by (tenant, "rotate" or
        "revoke")."""


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Start a gateway with one model in the catalog and no worker. No test makes a call."""
    async with keyed_cluster(tmp_path_factory.mktemp("roles"), "tenants: [{name: fixed}]\n") as keyed:
        keyed.gateway.directory.apply_catalog([CatalogEntry(name="sim", state=ModelState.LOADING)])
        address, ledger = keyed.gateway.endpoints["admin"], keyed.ledger
        keys = {
            role: await role_key(ledger, "ops" if role in ("operator", "viewer") else OWN, role) for role in ROLES[1:]
        }
        await role_key(ledger, OTHER, "caller")
        ids = {
            (tenant, use): (await asyncio.to_thread(ledger.keys.create, tenant, use)).stored.id
            for tenant in (OWN, OTHER)
            for use in ("rotate", "revoke")
        }
        ledger.usage.insert([record("a", tenant=OWN), record("b", tenant=OTHER)])
        clients = {role: AdminClient(address, keys.get(role, "")) for role in ROLES}
        for role in ROLES[1:]:
            await until_known(clients[role], "Catalog.List", admin_pb2.ListRequest())
        yield World(keyed, clients, ids)
        for client in clients.values():
            await client.channel.close()


def request_of(world: World, verb: str, tenant: str) -> Any:
    """Return a valid request of a method about a tenant."""
    name = f"tenants/{tenant}"
    t, u = tenants_pb2, usage_pb2
    made: dict[str, Any] = {
        "Fleet.ListWorkers": admin_pb2.ListWorkersRequest(),
        "Fleet.AbortRequest": admin_pb2.AbortRequestRequest(request_id="none", reason="x"),
        "Fleet.Drain": admin_pb2.DrainRequest(target="nobody"),
        "Fleet.Cordon": admin_pb2.CordonRequest(target="nobody"),
        "Fleet.Uncordon": admin_pb2.UncordonRequest(target="nobody"),
        "Catalog.List": admin_pb2.ListRequest(),
        "Catalog.Get": admin_pb2.GetRequest(name="sim"),
        "Fleet.ExplainRequest": routing_pb2.ExplainRequestRequest(request_id="none", parent=name),
        "Fleet.GetOverview": admin_pb2.GetOverviewRequest(),
        "Fleet.ExplainScaling": scaling_pb2.ExplainScalingRequest(name="sim"),
        "Catalog.Scale": scaling_pb2.ScaleRequest(name="sim", replicas=1),
        "Catalog.Freeze": scaling_pb2.FreezeRequest(name="sim"),
        "Catalog.Unfreeze": scaling_pb2.UnfreezeRequest(name="sim"),
        "Catalog.Apply": catalog_pb2.ApplyRequest(),
        "Catalog.Diff": catalog_pb2.DiffRequest(),
        "Catalog.SetWeights": catalog_pb2.SetWeightsRequest(name="sim", version="v1", weight=1),
        "Catalog.Promote": catalog_pb2.PromoteRequest(name="sim"),
        "Catalog.Rollback": catalog_pb2.RollbackRequest(name="sim"),
        "Catalog.Quarantine": catalog_pb2.QuarantineRequest(name="sim", version="v1"),
        "Catalog.LoadAdapter": adapters_pb2.LoadAdapterRequest(name="sim", adapter="a", source="/a"),
        "Catalog.UnloadAdapter": adapters_pb2.UnloadAdapterRequest(name="sim", adapter="a"),
        "Catalog.ListAdapters": adapters_pb2.ListAdaptersRequest(name="sim"),
        "Tenants.Create": t.CreateTenantRequest(tenant=t.Tenant(name=f"{name}2"), validate_only=True),
        "Tenants.Get": t.GetTenantRequest(name=name),
        "Tenants.List": t.ListTenantsRequest(),
        "Tenants.Update": t.UpdateTenantRequest(tenant=t.Tenant(name=name, weight=2), validate_only=True),
        "Tenants.Delete": t.DeleteTenantRequest(name=name, reason="x", validate_only=True),
        "Tenants.Undelete": t.UndeleteTenantRequest(name=f"{name}-spare"),
        "Tenants.Suspend": t.SuspendTenantRequest(name=f"{name}-spare", reason="x"),
        "Tenants.Resume": t.ResumeTenantRequest(name=name),
        "Keys.Create": t.CreateKeyRequest(parent=name, validate_only=True),
        "Keys.List": t.ListKeysRequest(parent=name),
        "Keys.Rotate": t.RotateKeyRequest(name=f"{name}/keys/{world.keys[tenant, 'rotate']}"),
        "Keys.Revoke": t.RevokeKeyRequest(name=f"{name}/keys/{world.keys[tenant, 'revoke']}", reason="x"),
        "Usage.Query": u.QueryUsageRequest(parent=name),
        "Usage.Export": u.ExportUsageRequest(parent=name),
        "Usage.QuerySlo": u.QuerySloRequest(parent=name),
        "Audit.List": u.ListAuditRequest(parent=name),
    }
    return made[verb]


NO, OK, MISSING, BAD = "PERMISSION_DENIED", "OK", "NOT_FOUND", "INVALID_ARGUMENT"
AWAY = "UNAVAILABLE"  # granted, but there is no controller to answer
BY_CONTROLLER = tuple(
    f"Catalog.{verb}"
    for verb in (
        *("Apply", "SetWeights", "Promote", "Rollback", "Quarantine", "Scale", "Freeze", "Unfreeze"),
        *("LoadAdapter", "UnloadAdapter"),
    )
)
# For each verb: the answers to viewer, tenant_admin and operator, first for the tenant acme, then for the other tenant.
CLUSTER = (OK, NO, OK), (OK, NO, OK)
READ = (OK, OK, OK), (OK, MISSING, OK)
KEYS = (NO, OK, OK), (NO, MISSING, OK)
RULE = (NO, NO, OK), (NO, NO, OK)
TABLE = {
    "Fleet.ListWorkers": CLUSTER,
    "Fleet.AbortRequest": ((NO, NO, MISSING), (NO, NO, MISSING)),
    **dict.fromkeys(("Fleet.Drain", "Fleet.Cordon", "Fleet.Uncordon"), ((NO, NO, BAD), (NO, NO, BAD))),
    "Catalog.List": CLUSTER,
    "Catalog.Get": CLUSTER,
    "Catalog.ListAdapters": CLUSTER,
    "Fleet.ExplainRequest": ((MISSING, MISSING, MISSING), (MISSING, MISSING, MISSING)),
    **dict.fromkeys(("Fleet.ExplainScaling", "Catalog.Diff"), ((AWAY, NO, AWAY), (AWAY, NO, AWAY))),
    **dict.fromkeys(BY_CONTROLLER, ((NO, NO, AWAY), (NO, NO, AWAY))),
    "Tenants.Create": RULE,
    "Tenants.Get": READ,
    **dict.fromkeys(("Fleet.GetOverview", "Tenants.List"), ((OK, OK, OK), (OK, OK, OK))),
    "Tenants.Update": RULE,
    "Tenants.Delete": RULE,
    "Tenants.Undelete": ((NO, NO, MISSING), (NO, NO, MISSING)),
    "Tenants.Suspend": ((NO, NO, MISSING), (NO, NO, MISSING)),
    "Tenants.Resume": RULE,
    "Keys.Create": KEYS,
    "Keys.List": READ,
    "Keys.Rotate": KEYS,
    "Keys.Revoke": KEYS,
    "Usage.Query": READ,
    "Usage.Export": READ,
    "Usage.QuerySlo": READ,
    "Audit.List": READ,
}


def test_the_table_is_whole() -> None:
    """Each method of the admin API has a row in the gateway's table of permissions, so no method is unprotected. This
    file's own table of expected permissions has the same methods."""
    files = (admin_pb2.DESCRIPTOR, tenants_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR)
    methods = {
        f"{service.name}.{method.name}"
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert set(TABLE) == set(VERBS) == methods


@pytest.mark.parametrize("verb", TABLE)
@pytest.mark.parametrize("role", ROLES)
async def test_each_role_at_each_verb(world: World, verb: str, role: str) -> None:
    """Each method is granted or refused to each role as TABLE says, both for the caller's own tenant and for another
    tenant."""
    expected = {"nobody": ("UNAUTHENTICATED",) * 2, "caller": (NO, NO)}.get(role)
    if expected is None:
        at = ("viewer", "tenant_admin", "operator").index(role)
        expected = TABLE[verb][0][at], TABLE[verb][1][at]
    client = world.clients[role]
    got = [await client.code(verb, request_of(world, verb, tenant)) for tenant in (OWN, OTHER)]
    assert tuple(got) == expected


@pytest.mark.parametrize("verb", [v for v, rule in TABLE.items() if rule in (READ, KEYS)])
async def test_another_tenant_reads_as_none(world: World, verb: str) -> None:
    """A tenant administrator gets the same error, byte for byte, for another tenant and for a tenant that does not
    exist."""
    client, ghost = world.clients["tenant_admin"], "ghost"
    world.keys |= {(ghost, use): world.keys[OTHER, use] for use in ("rotate", "revoke")}
    there = await client.refused(verb, request_of(world, verb, OTHER))
    absent = await client.refused(verb, request_of(world, verb, ghost))
    raw = [answer.trailers["grpc-status-details-bin"] for answer in (there, absent)]
    assert isinstance(raw[0], bytes)
    assert raw[0].replace(OTHER.encode(), ghost.encode()) == raw[1]
    assert (there.code, there.message.replace(OTHER, ghost)) == (absent.code, absent.message)


async def test_lists_end_at_the_own_tenant(world: World) -> None:
    """If a request names no tenant, a tenant administrator gets the rows of its own tenant, and a viewer gets the rows
    of all tenants."""
    admin, viewer = world.clients["tenant_admin"], world.clients["viewer"]
    for client, tenants in ((admin, {OWN}), (viewer, {OWN, OTHER, "ops", "fixed"})):
        found = await client.ask("Tenants.List", tenants_pb2.ListTenantsRequest())
        assert {tenant.name.removeprefix("tenants/") for tenant in found.tenants} == tenants
        rows = await client.ask("Usage.Query", usage_pb2.QueryUsageRequest(group_by=["tenant"]))
        assert {usage_sum.group["tenant"] for usage_sum in rows.sums} == tenants & {OWN, OTHER}
        pages = await client.ask("Usage.Export", usage_pb2.ExportUsageRequest())
        assert {record.tenant for page in pages for record in page.records} == tenants & {OWN, OTHER}
    operator = world.clients["operator"]
    for tenant in (OWN, OTHER):
        await operator.ask("Tenants.Resume", tenants_pb2.ResumeTenantRequest(name=f"tenants/{tenant}"))
    events = (await admin.ask("Audit.List", usage_pb2.ListAuditRequest())).events
    assert {event.tenant for event in events} == {OWN}
    assert {event.source for event in events if event.details["role"] == "operator"} == {""}
    events = (await viewer.ask("Audit.List", usage_pb2.ListAuditRequest())).events
    assert {OWN, OTHER} <= {event.tenant for event in events}
    assert any(event.source for event in events if event.details["role"] == "operator")


async def test_where_calls_run_is_the_operators_to_know(world: World) -> None:
    """The records that a tenant administrator reads leave out the names of workers, pods, nodes and gateways."""
    place = {"worker": "m-1", "pod": "gpu-a", "node": "ip-10-0-3-7", "gateway": "gateway-0"}
    world.keyed.ledger.usage.insert([record("placed", tenant=OWN, model="placed", **place)])
    for role, expected in (("operator", place), ("viewer", place), ("tenant_admin", dict.fromkeys(place, ""))):
        request = usage_pb2.ExportUsageRequest(parent=f"tenants/{OWN}", model="placed")
        (row,) = [record for page in await world.clients[role].ask("Usage.Export", request) for record in page.records]
        assert {name: getattr(row, name) for name in place} == expected, role


@pytest.mark.parametrize("role", ["viewer", "operator", "root"])
async def test_an_administrator_makes_nobody_greater(world: World, role: str) -> None:
    """A tenant administrator cannot create, rotate or revoke keys of a higher role."""
    client = world.clients["tenant_admin"]
    request = tenants_pb2.CreateKeyRequest(parent=f"tenants/{OWN}", key=tenants_pb2.Key(role=role))
    assert (await client.refused("Keys.Create", request)).code.name == NO
    if role == "root":
        return
    made = (await asyncio.to_thread(world.keyed.ledger.keys.create, OWN, "", role=role)).stored
    name = f"tenants/{OWN}/keys/{made.id}"
    for verb, asked in (
        ("Keys.Rotate", tenants_pb2.RotateKeyRequest(name=name)),
        ("Keys.Revoke", tenants_pb2.RevokeKeyRequest(name=name, reason="x")),
    ):
        assert (await client.refused(verb, asked)).code.name == NO
    assert world.keyed.ledger.keys.get(OWN, made.id) == made
    events = world.keyed.ledger.audit.list(equal={"outcome": "permission_denied"})
    assert {"keys.rotate", "keys.revoke"} <= {event["action"] for event in events if event["object"] == name}


async def test_nobody_raises_the_own_limits(world: World) -> None:
    """A tenant administrator cannot raise the limits of its own tenant. The gateway refuses to update them, whatever
    the field mask, and refuses to create the tenant a second time."""
    client = world.clients["tenant_admin"]
    before = world.keyed.ledger.tenants.get(OWN)
    wide = tenants_pb2.Tenant(name=f"tenants/{OWN}", limits=tenants_pb2.Limits(tokens_per_minute=10**9))
    for paths in ([], ["limits"], ["limits.tokens_per_minute"], ["*"]):
        update = tenants_pb2.UpdateTenantRequest(tenant=wide, update_mask=FieldMask(paths=paths))
        assert await client.code("Tenants.Update", update) == NO
    assert await client.code("Tenants.Create", tenants_pb2.CreateTenantRequest(tenant=wide)) == NO
    assert world.keyed.ledger.tenants.get(OWN) == before


async def test_who_holds_the_secret_is_an_operator(world: World) -> None:
    """The token that is derived from the cluster's secret is accepted. A token that is derived from another secret is
    refused."""
    address = world.keyed.gateway.endpoints["admin"]
    for secret, code in ((SECRET, OK), ("t" * 32, "UNAUTHENTICATED")):
        async with AdminClient(address, admin_token(secret.encode())) as client:
            assert await client.code("Tenants.List", tenants_pb2.ListTenantsRequest()) == code


async def test_the_client_port_knows_no_roles(world: World) -> None:
    """The client port serves no admin method, and does not accept the token that is derived from the cluster's
    secret."""
    async with AdminClient(world.keyed.gateway.endpoints["grpc"], admin_token(SECRET.encode())) as client:
        assert await client.code("Tenants.List", tenants_pb2.ListTenantsRequest()) == "UNIMPLEMENTED"
    reply = await world.keyed.fetch("/v1/models", key=admin_token(SECRET.encode()))
    assert reply.status == 401


async def test_refusals_are_in_the_audit(world: World) -> None:
    """A refused request is audited with the method and the caller's address, even if it named another tenant."""
    client, listing = world.clients["tenant_admin"], tenants_pb2.ListTenantsRequest()
    suspend = tenants_pb2.SuspendTenantRequest(name=f"tenants/{OWN}", reason="x")

    def events_now() -> list[dict[str, Any]]:
        world.keyed.door.audit.flush()
        return world.keyed.ledger.audit.list(kind="auth_failure", limit=1000)

    async def all_audited() -> bool:  # of many events in a second, as in the tests above, some are only counted
        await client.refused("Tenants.Get", tenants_pb2.GetTenantRequest(name=f"tenants/{OTHER}"))
        await client.refused("Tenants.Suspend", suspend)
        await world.clients["nobody"].refused("Tenants.List", listing)
        async with AdminClient(world.keyed.gateway.endpoints["admin"], "hr_kabc_" + "x" * 43) as forged:
            await forged.refused("Tenants.List", listing)
        events = events_now()
        return "kabc" in {event["actor"] for event in events} and {
            ("authorize", "cluster.admin.v1.Tenants.Get", "not_found"),
            ("authorize", "cluster.admin.v1.Tenants.Suspend", "denied"),
            ("authenticate", "", "missing"),
            ("authenticate", "", "unknown"),
        } <= {(event["action"], event["object"], event["outcome"]) for event in events}

    await eventually(all_audited, "each refusal is in the audit")
    events = events_now()
    assert all(event["source"] for event in events if "suppressed" not in event["details"])


def test_limits_are_all_in_the_api() -> None:
    """Every limit and every other field of a tenant policy can be set over the admin API."""
    ours = {"class" if field.name == "priority_class" else field.name for field in dataclasses.fields(TenantPolicy)}
    theirs = {
        "class" if field.name == "priority_class" else field.name for field in tenants_pb2.Tenant.DESCRIPTOR.fields
    }
    assert ours - {"handle"} <= theirs
    parts = ((TenantLimits, tenants_pb2.Limits), (Retention, tenants_pb2.Retention), (GuardRule, tenants_pb2.GuardRule))
    for part, message in parts:
        assert {field.name for field in dataclasses.fields(part)} == set(message.DESCRIPTOR.fields_by_name)


async def test_a_suspended_tenants_administrator_is_out(world: World) -> None:
    """The administrator of a suspended tenant is refused on the admin port within two seconds."""
    key = await role_key(world.keyed.ledger, "fallen", "tenant_admin")
    request = tenants_pb2.ListKeysRequest(parent="tenants/fallen")
    async with AdminClient(world.keyed.gateway.endpoints["admin"], key) as client:
        await until_known(client, "Keys.List", request)
        assert await client.code("Keys.List", request) == OK
        suspend = tenants_pb2.SuspendTenantRequest(name="tenants/fallen", reason="unpaid")
        await world.clients["operator"].ask("Tenants.Suspend", suspend)
        async with LoopClock() as clock:
            while (answer := await client.code("Keys.List", request)) == OK:
                assert clock.now_s < 2.0
        assert answer == NO
