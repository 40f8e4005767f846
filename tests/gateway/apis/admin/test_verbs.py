"""The effect and the audit events of each admin method, with valid and with invalid input."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from cluster.admin.v1 import admin_pb2, tenants_pb2, usage_pb2
from cluster.admin.v1.routing_pb2 import ExplainRequestRequest
from cluster.api.types import CatalogEntry
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.tenants.identity import authenticate
from tests.ledger.samples import record
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.keyed import PEPPER, Keyed, keyed_cluster

Tenant, Limits = tenants_pb2.Tenant, tenants_pb2.Limits
DEFAULTS = "tenant_defaults: {class: batch, models: [m], limits: {daily_tokens: 7, requests_per_minute: 9}}\n"
DOCS = Path(__file__).parents[4] / "docs" / "admin.md"
COST = "cost: {currency: EUR, gpu_hour: {H100: 2.0}}\n"


class World:
    """A gateway and the client of an operator."""

    def __init__(self, keyed: Keyed, operator: AdminClient, key: str) -> None:
        self.keyed = keyed
        self.operator = operator
        self.key = key

    async def ask(self, verb: str, request: Any) -> Any:
        """Call a method as the operator."""
        return await self.operator.ask(verb, request)

    async def create(self, name: str, **fields: Any) -> Any:
        """Create a tenant. `fields`: the fields of the tenant, as in JSON."""
        tenant = ParseDict({"name": f"tenants/{name}", **fields}, Tenant())
        return await self.ask("Tenants.Create", tenants_pb2.CreateTenantRequest(tenant=tenant))

    async def update(self, name: str, *paths: str, **fields: Any) -> Any:
        """Update a tenant. `paths`: the update mask, which may be empty. `fields`: the fields of the tenant, as in
        JSON."""
        tenant = ParseDict({"name": f"tenants/{name}", **fields}, Tenant())
        mask = FieldMask(paths=paths)
        return await self.ask("Tenants.Update", tenants_pb2.UpdateTenantRequest(tenant=tenant, update_mask=mask))

    def audited(self, name: str) -> list[dict[str, Any]]:
        """Return the audit events about an object, newest first."""
        return self.keyed.ledger.audit.list(equal={"object": name}, limit=1000)

    def audit_file(self) -> str:
        """Return the contents of the gateway's local audit file."""
        return "".join(path.read_text() for path in self.keyed.file.parent.rglob("audit.jsonl"))


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """Start a gateway whose configuration file declares one tenant."""
    declared = DEFAULTS + COST + "tenants: [{name: fixed}]\n"
    async with keyed_cluster(tmp_path_factory.mktemp("verbs"), declared) as keyed:
        key = await role_key(keyed.ledger, "ops", "operator")
        async with AdminClient(keyed.gateway.endpoints["admin"], key) as operator:
            await until_known(operator, "Catalog.List", admin_pb2.ListRequest())
            yield World(keyed, operator, key)


# ---- tenants


async def test_a_new_tenant_stands_over_the_defaults(world: World) -> None:
    """The fields of a Create request override the defaults of the file. A field in `unset_mask` stays empty although
    the field has a default."""
    made = await world.create("a1", **{"class": "interactive", "limits": {"daily_tokens": 5}, "labels": {"team": "x"}})
    assert (made.name, made.priority_class, list(made.models)) == ("tenants/a1", "interactive", ["m"])
    assert (made.limits.daily_tokens, made.limits.requests_per_minute, made.origin) == (5, 9, "api")
    assert made.create_time.seconds == pytest.approx(time.time(), abs=60)
    bare = tenants_pb2.CreateTenantRequest(tenant=Tenant(name="tenants/a2"))
    bare.unset_mask.paths.append("limits.daily_tokens")
    found = await world.ask("Tenants.Create", bare)
    assert (found.limits.HasField("daily_tokens"), found.limits.requests_per_minute) == (False, 9)
    assert await world.ask("Tenants.Get", tenants_pb2.GetTenantRequest(name="tenants/a2")) == found


async def test_a_create_that_is_repeated(world: World) -> None:
    """A Create request that is repeated with the same request_id returns the same tenant. If the tenant differs, or if
    the request_id is missing, the second request is refused."""
    request = tenants_pb2.CreateTenantRequest(tenant=Tenant(name="tenants/twice", weight=2), request_id="r1")
    first = await world.ask("Tenants.Create", request)
    assert await world.ask("Tenants.Create", request) == first
    request.tenant.weight = 3
    assert (await world.operator.refused("Tenants.Create", request)).reason == "ALREADY_EXISTS"
    request.tenant.weight, request.request_id = 2, ""
    assert (await world.operator.refused("Tenants.Create", request)).code.name == "ALREADY_EXISTS"


async def test_masks(world: World) -> None:
    """An update sets the fields that the mask names, removes named fields without a value, and keeps all other fields.
    A map that the mask names as a whole is replaced."""
    await world.create("mask", limits={"tokens_per_minute": 5}, labels={"a": "1", "b.c": "2"}, weight=2)
    changed = await world.update("mask", "limits.tokens_per_minute", "labels.b.c", weight=9)
    assert (changed.limits.HasField("tokens_per_minute"), dict(changed.labels)) == (False, {"a": "1"})
    assert (changed.limits.daily_tokens, changed.weight) == (7, 2)
    changed = await world.update("mask", "limits", "labels", limits={"monthly_tokens": 3}, labels={"z": "9"})
    assert (changed.limits, dict(changed.labels)) == (Limits(monthly_tokens=3), {"z": "9"})
    changed = await world.update("mask", weight=4, limits={"daily_tokens": 8}, origin="file", suspended=True)
    assert (changed.weight, changed.limits, changed.suspended) == (4, Limits(daily_tokens=8, monthly_tokens=3), False)
    changed = await world.update("mask", "class", "models", "log_prompts", "guards", log_prompts=True)
    assert (changed.priority_class, list(changed.models), changed.log_prompts) == ("standard", ["*"], True)
    guard = {"builtin": "sizes", "max_characters": 9}
    changed = await world.update("mask", "guards", guards=[guard])
    assert (changed.guards[0].max_characters, changed.guards[0].fail) == (9, "closed")
    event = world.audited("tenants/mask")[0]
    assert (event["action"], event["details"]["fields"]) == ("tenants.update", ["guards"])


async def test_validation_alone_changes_nothing(world: World) -> None:
    """A request with validate_only returns the usual answer, and leaves the database and the audit unchanged."""
    await world.create("valid")
    before = world.keyed.ledger.tenants.get("valid"), world.audited("tenants/valid")
    update = tenants_pb2.UpdateTenantRequest(tenant=Tenant(name="tenants/valid", weight=5), validate_only=True)
    assert (await world.ask("Tenants.Update", update)).weight == 5
    update.tenant.weight = -1
    assert (await world.operator.refused("Tenants.Update", update)).fields == ["weight"]
    for erase in (False, True):
        delete = tenants_pb2.DeleteTenantRequest(name="tenants/valid", erase=erase, validate_only=True, reason="x")
        assert (await world.ask("Tenants.Delete", delete)).erased_rows == 0
    create = tenants_pb2.CreateTenantRequest(tenant=Tenant(name="tenants/valid2"), validate_only=True)
    assert (await world.ask("Tenants.Create", create)).limits.daily_tokens == 7
    key = tenants_pb2.CreateKeyRequest(parent="tenants/valid", validate_only=True)
    assert (await world.ask("Keys.Create", key)).secret == ""
    assert (world.keyed.ledger.tenants.get("valid"), world.audited("tenants/valid")) == before
    assert world.keyed.ledger.keys.list("valid") == []
    assert (await world.operator.refused("Tenants.Get", tenants_pb2.GetTenantRequest(name="tenants/valid2"))).reason


async def test_deleted_and_erased(world: World) -> None:
    """The usage of a deleted tenant is kept. After a tenant is erased, no row holds the tenant's name, not even in the
    audit."""
    await world.create("gone")
    world.keyed.ledger.usage.insert([record("gone-1", tenant="gone")])
    name: Any = {"name": "tenants/gone"}
    await world.ask("Tenants.Delete", tenants_pb2.DeleteTenantRequest(**name, reason="left"))
    assert (await world.operator.refused("Tenants.Get", tenants_pb2.GetTenantRequest(**name))).code.name == "NOT_FOUND"
    sums = (await world.ask("Usage.Query", usage_pb2.QueryUsageRequest(parent="tenants/gone"))).sums
    assert [usage_sum.requests for usage_sum in sums] == [1]
    erase = tenants_pb2.DeleteTenantRequest(**name, erase=True, reason="gone has asked")
    assert (await world.ask("Tenants.Delete", erase)).erased_rows >= 2
    assert (await world.operator.refused("Tenants.Delete", erase)).code.name == "NOT_FOUND"
    left = json.dumps(world.keyed.ledger.audit.list(limit=1000))
    assert '"gone' not in left
    assert "tenants/gone" not in left
    assert "… has asked" in left or "\\u2026 has asked" in left


async def test_what_a_file_declares_is_read_only(world: World) -> None:
    """A change to a tenant that the configuration file declares fails with MANAGED_BY_FILE. Keys of such a tenant can
    be created."""
    name = "tenants/fixed"
    for verb, request in (
        ("Tenants.Update", tenants_pb2.UpdateTenantRequest(tenant=Tenant(name=name, weight=2))),
        ("Tenants.Delete", tenants_pb2.DeleteTenantRequest(name=name, reason="x")),
        ("Tenants.Delete", tenants_pb2.DeleteTenantRequest(name=name, reason="x", erase=True)),
        ("Tenants.Suspend", tenants_pb2.SuspendTenantRequest(name=name, reason="x")),
        ("Tenants.Resume", tenants_pb2.ResumeTenantRequest(name=name)),
    ):
        answer = await world.operator.refused(verb, request)
        assert (answer.code.name, answer.reason) == ("FAILED_PRECONDITION", "MANAGED_BY_FILE"), verb
        assert "change the file" in answer.message
    assert (await world.ask("Tenants.Get", tenants_pb2.GetTenantRequest(name=name))).origin == "file"
    assert {event["outcome"] for event in world.audited(name)} == {"managed_by_file"}
    assert (await world.ask("Keys.Create", tenants_pb2.CreateKeyRequest(parent=name))).secret.startswith("hr_")


async def test_listing_by_page_and_filter(world: World) -> None:
    """A list of tenants in pages holds every tenant once. A filter with AND matches if all its terms match."""
    for at in range(5):
        await world.create(f"page{at}", labels={"row": str(at % 2)}, **{"class": "batch" if at else "standard"})
    for wanted, names in (
        ('labels.row = "0"', ["page0", "page2", "page4"]),
        ("labels.row = 0 AND class = batch", ["page2", "page4"]),
        ("labels.row = 1 AND suspended = true", []),
        ("labels.row = 1 AND origin = api", ["page1", "page3"]),
    ):
        found: list[str] = []
        token = ""
        while True:
            request = tenants_pb2.ListTenantsRequest(page_size=1, page_token=token, filter=wanted)
            page = await world.ask("Tenants.List", request)
            found += [tenant.name.removeprefix("tenants/") for tenant in page.tenants]
            token = page.next_page_token
            if not token:
                break
        assert found == names


# ---- keys


async def test_a_keys_life(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """The secret of a key is returned when the key is created or rotated, and is in no list, audit row or log. A key
    can be revoked. It can also be rotated with an overlap, during which the old secret stays valid."""
    await world.create("keyed")
    expiry = Timestamp(seconds=int(time.time()) + 3600)
    asked = tenants_pb2.Key(display_name="ci", role="tenant_admin", expire_time=expiry)
    request = tenants_pb2.CreateKeyRequest(parent="tenants/keyed", key=asked, reason="for ci")
    made = await world.ask("Keys.Create", request)
    assert (made.key.display_name, made.key.role, made.key.state) == ("ci", "tenant_admin", "active")
    assert made.key.expire_time == expiry
    snapshot = world.keyed.ledger.snapshots.read()
    assert authenticate(snapshot, made.secret, [PEPPER.encode()], time.time()).reason == "ok"
    rotate = tenants_pb2.RotateKeyRequest(name=made.key.name, overlap_s=60)
    second = await world.ask("Keys.Rotate", rotate)
    assert (second.key.role, second.key.rotated_from) == ("tenant_admin", made.key.name.rsplit("/", 1)[1])
    revoke = tenants_pb2.RevokeKeyRequest(name=second.key.name, reason=f"lost {second.secret}")
    assert (await world.ask("Keys.Revoke", revoke)).state == "revoked"
    assert (await world.ask("Keys.Revoke", revoke)).state == "revoked"
    listed, token = [], ""
    while True:
        page = await world.ask(
            "Keys.List", tenants_pb2.ListKeysRequest(parent="tenants/keyed", page_size=1, page_token=token)
        )
        listed += list(page.keys)
        if not (token := page.next_page_token):
            break
    assert [(key.name, key.state) for key in listed] == [(made.key.name, "active"), (second.key.name, "revoked")]
    rows = json.dumps(world.keyed.ledger.audit.list(tenant="keyed", limit=1000))
    lines = world.audit_file() + "".join(capfd.readouterr())
    for secret in (made.secret, second.secret):
        assert secret not in rows
        assert secret not in lines
    assert "for ci" in rows
    assert "for ci" in lines


async def test_a_key_is_not_made_twice(world: World) -> None:
    """A Create request for a key with a repeated request_id is refused, and the error names the existing key. A request
    with another request_id creates another key."""
    await world.create("once")
    request = tenants_pb2.CreateKeyRequest(parent="tenants/once", request_id="abc")
    first = await world.ask("Keys.Create", request)
    again = await world.operator.refused("Keys.Create", request)
    assert (again.code.name, again.reason) == ("ALREADY_EXISTS", "ALREADY_EXISTS")
    assert first.key.name in again.message
    request.request_id = "abd"
    await world.ask("Keys.Create", request)
    assert len(world.keyed.ledger.keys.list("once")) == 2


# ---- usage and audit


async def test_usage_is_summed_paged_and_exported(world: World) -> None:
    """Usage.Query returns sums of usage by group, in pages, with the costs at the configured rates. Usage.Export
    returns the usage records of one model."""
    rows = [record(f"u{at}", tenant="spender", model=f"m{at % 3}", gpu_seconds=1800.0) for at in range(6)]
    world.keyed.ledger.usage.insert([*rows, record("u9", tenant="spender", model="m0", gpu="?", gpu_seconds=1.0)])
    query = usage_pb2.QueryUsageRequest(parent="tenants/spender", group_by=["model", "label:team"], cost=True)
    query.page_size = 2
    first = await world.ask("Usage.Query", query)
    query.page_token = first.next_page_token
    second = await world.ask("Usage.Query", query)
    found = [(dict(row.group), row.requests, row.cost, row.HasField("cost")) for row in (*first.sums, *second.sums)]
    assert found == [
        ({"model": "m0", "label:team": "a"}, 3, 0.0, False),
        ({"model": "m1", "label:team": "a"}, 2, 2.0, True),
        ({"model": "m2", "label:team": "a"}, 2, 2.0, True),
    ]
    assert second.next_page_token == ""
    total = usage_pb2.QueryUsageRequest(parent="tenants/spender", total=True)
    (in_all,) = (await world.ask("Usage.Query", total)).sums
    assert (in_all.requests, in_all.completion_tokens, in_all.reasoning_tokens) == (7, 35, 14)
    pages = await world.ask("Usage.Export", usage_pb2.ExportUsageRequest(parent="tenants/spender", model="m0"))
    records = [record for page in pages for record in page.records]
    assert sorted(record.record_id for record in records) == ["u0", "u3", "u9"]
    assert (records[0].ttft_s, dict(records[0].labels)) == (0.5, {"team": "a"})
    assert [record.reasoning_tokens for record in records] == [2, 2, 2]


async def test_calls_are_judged_by_the_slo_of_the_catalog(world: World) -> None:
    """Attainment, the share of calls that met their SLO, is returned in pages, and only for models whose SLO the
    gateway knows."""
    world.keyed.gateway.directory.apply_catalog([
        CatalogEntry("paced", version="v1", slo_ttft_s=1.0, slo_itl_s=0.5, slo_target=0.9)
    ])  # fmt: skip
    rows = [record("p1", model="paced"), record("p2", model="paced", ttft_s=1.5), record("p3", model="gone")]
    world.keyed.ledger.usage.insert([UsageRecord.from_json(row.as_json() | {"tenant": "paced"}) for row in rows])
    query = usage_pb2.QuerySloRequest(parent="tenants/paced", page_size=1)
    first = await world.ask("Usage.QuerySlo", query)
    query.page_token = first.next_page_token
    second = await world.ask("Usage.QuerySlo", query)
    (gone,), (paced,) = first.sums, second.sums
    assert (gone.model, gone.HasField("target"), gone.not_judged) == ("gone", False, 1)
    assert (paced.target, paced.ttft_s, paced.met, paced.late_first_token) == (0.9, 1.0, 1, 1)
    assert second.next_page_token == ""


async def test_a_long_export_has_every_record_once(world: World) -> None:
    """An export in several messages holds each usage record once, even if more than a thousand records have the same
    time."""
    world.keyed.ledger.usage.insert([record(f"long{at:04}", tenant="long") for at in range(1201)])
    pages = await world.ask("Usage.Export", usage_pb2.ExportUsageRequest(parent="tenants/long"))
    assert len(pages) == 3
    assert [record.record_id for page in pages for record in page.records] == [f"long{at:04}" for at in range(1201)]


async def test_the_audit_names_who_from_where_and_why(world: World) -> None:
    """Each change, granted or refused, is one audit event with the key's id, the address and the reason. If the events
    are listed page by page, each event is on one page only."""
    await world.create("watched")
    suspend = tenants_pb2.SuspendTenantRequest(name="tenants/watched", reason="unpaid")
    await world.ask("Tenants.Suspend", suspend)
    await world.ask("Tenants.Resume", tenants_pb2.ResumeTenantRequest(name="tenants/watched", reason="paid"))
    await world.operator.refused("Tenants.Suspend", tenants_pb2.SuspendTenantRequest(name="tenants/none", reason="x"))
    request = usage_pb2.ListAuditRequest(parent="tenants/watched", page_size=2)
    first = await world.ask("Audit.List", request)
    request.page_token = first.next_page_token
    events = [*first.events, *(await world.ask("Audit.List", request)).events]
    assert [(event.action, event.reason, event.outcome) for event in events] == [
        ("tenants.resume", "paid", "ok"),
        ("tenants.suspend", "unpaid", "ok"),
        ("tenants.create", "", "ok"),
    ]
    assert {event.actor for event in events} == {f"key:{world.key.split('_')[1]}"}
    assert all("127.0.0.1" in event.source for event in events)
    none = usage_pb2.ListAuditRequest(filter='object = "tenants/none" AND kind = "admin"')
    assert [event.outcome for event in (await world.ask("Audit.List", none)).events] == ["not_found"]
    late = usage_pb2.ListAuditRequest(since_time=Timestamp(seconds=int(time.time()) + 60))
    assert not (await world.ask("Audit.List", late)).events


# ---- docs


async def test_the_documented_calls(world: World) -> None:
    """The gateway accepts each example of docs/admin.md. The examples that abort or explain a call get NOT_FOUND, since
    the named call does not exist."""
    shown = [shlex.split(line) for line in DOCS.read_text().splitlines() if line.startswith("    ask ")]
    assert len(shown) >= 8
    for _, method, body in shown:
        service, name = method.split("/")
        file = {"Usage": usage_pb2, "Audit": usage_pb2, "Fleet": admin_pb2}.get(service, tenants_pb2)
        kind = GetMessageClass(file.DESCRIPTOR.services_by_name[service].methods_by_name[name].input_type)
        code = await world.operator.code(f"{service}.{name}", ParseDict(json.loads(body), kind()))
        assert code == ("NOT_FOUND" if name in ("AbortRequest", "ExplainRequest") else "OK"), body


# ---- bad input

T, U, A = tenants_pb2, usage_pb2, admin_pb2
BAD: list[tuple[str, Any, str]] = [
    ("Tenants.Create", T.CreateTenantRequest(), "tenant.name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="acme")), "tenant.name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/Acme")), "tenant.name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/nobody")), "name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/" + "a" * 64)), "tenant.name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/a/keys/k")), "tenant.name"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", weight=0)), "weight"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", weight=float("nan"))), "weight"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", weight=float("inf"))), "weight"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", priority_class="gold")), "class"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", on_budget="explode")), "on_budget"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", models=[""])), "models"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b"), request_id="\n"), "request_id"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", labels={"a": "\0"})), "tenant.labels"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", cache_group="x\0")), "tenant.cache_group"),
    ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b"), reason="x" * 10_000), "reason"),
    *(
        ("Tenants.Create", T.CreateTenantRequest(tenant=Tenant(name="tenants/b", limits=limits)), f"limits.{name}")
        for limits, name in (
            (Limits(tokens_per_minute=0), "tokens_per_minute"),
            (Limits(requests_per_minute=-1), "requests_per_minute"),
            (Limits(daily_tokens=2**63 - 1), "daily_tokens"),
            (Limits(monthly_tokens=-(2**63)), "monthly_tokens"),
        )
    ),
    *(
        (
            "Tenants.Update",
            T.UpdateTenantRequest(tenant=Tenant(name="tenants/ops"), update_mask=FieldMask(paths=[path])),
            at,
        )
        for path, at in (
            ("name", "update_mask"),
            ("suspended", "update_mask"),
            ("origin", "update_mask"),
            ("*", "update_mask"),
            ("", "update_mask"),
            ("limits.nothing", "update_mask"),
            ("limits.daily_tokens.x", "update_mask"),
            ("class.x", "update_mask"),
            ("guards.0.on", "update_mask"),
            ("x" * 8000, "update_mask"),
        )
    ),
    ("Tenants.Update", T.UpdateTenantRequest(tenant=Tenant(name="tenants/ops")), "update_mask"),
    ("Tenants.Delete", T.DeleteTenantRequest(name="tenants/ops"), "reason"),
    ("Tenants.Suspend", T.SuspendTenantRequest(name="tenants/ops", reason="  "), "reason"),
    ("Tenants.List", T.ListTenantsRequest(page_size=-1), "page_size"),
    ("Tenants.List", T.ListTenantsRequest(page_token="%%%"), "page_token"),
    ("Tenants.List", T.ListTenantsRequest(page_token="x" * 8000), "page_token"),
    ("Tenants.List", T.ListTenantsRequest(page_token="W10"), "page_token"),
    ("Tenants.List", T.ListTenantsRequest(filter="class"), "filter"),
    ("Tenants.List", T.ListTenantsRequest(filter="limits = 5"), "filter"),
    ("Tenants.List", T.ListTenantsRequest(filter="class = a OR class = b"), "filter"),
    ("Tenants.List", T.ListTenantsRequest(filter="class = a AND class = b"), "filter"),
    ("Keys.Create", T.CreateKeyRequest(parent="ops"), "parent"),
    ("Keys.Create", T.CreateKeyRequest(parent="tenants/ops", key=T.Key(role="root")), "role"),
    ("Keys.Create", T.CreateKeyRequest(parent="tenants/ops", key=T.Key(display_name="x" * 300)), "name"),
    (
        "Keys.Create",
        T.CreateKeyRequest(parent="tenants/ops", key=T.Key(expire_time=Timestamp(seconds=1))),
        "expires_at",
    ),
    (
        "Keys.Create",
        T.CreateKeyRequest(parent="tenants/ops", key=T.Key(expire_time=Timestamp(seconds=-5))),
        "expire_time",
    ),
    (
        "Keys.Create",
        T.CreateKeyRequest(parent="tenants/ops", key=T.Key(expire_time=Timestamp(seconds=2**62))),
        "expire_time",
    ),
    ("Keys.Rotate", T.RotateKeyRequest(name="tenants/ops"), "name"),
    ("Keys.Revoke", T.RevokeKeyRequest(name="tenants/ops/keys/k1"), "reason"),
    ("Usage.Query", U.QueryUsageRequest(group_by=["shoe"]), "group_by"),
    ("Usage.Query", U.QueryUsageRequest(group_by=["day", "day"]), "group_by"),
    ("Usage.Query", U.QueryUsageRequest(since_day="yesterday"), "since_day"),
    ("Usage.QuerySlo", U.QuerySloRequest(until_day="today"), "until_day"),
    ("Usage.Query", U.QueryUsageRequest(parent="tenants/"), "parent"),
    ("Usage.Query", U.QueryUsageRequest(model="a\0"), "model"),
    ("Usage.Export", U.ExportUsageRequest(until_day="24.12."), "until_day"),
    ("Audit.List", U.ListAuditRequest(filter="source = x"), "filter"),
    ("Audit.List", U.ListAuditRequest(since_time=Timestamp(nanos=-1)), "since_time"),
    ("Fleet.ExplainRequest", ExplainRequestRequest(), "request_id"),
    ("Fleet.ExplainRequest", ExplainRequestRequest(request_id="x", parent="x"), "parent"),
    ("Fleet.AbortRequest", A.AbortRequestRequest(reason="x"), "request_id"),
    ("Fleet.AbortRequest", A.AbortRequestRequest(request_id="x"), "reason"),
    ("Fleet.AbortRequest", A.AbortRequestRequest(request_id="x", reason="x", parent="x"), "parent"),
]


@pytest.mark.parametrize(
    ("verb", "request_", "field"), BAD, ids=[f"{verb}-{at}" for at, (verb, _, _) in enumerate(BAD)]
)
async def test_bad_input(world: World, verb: str, request_: Any, field: str) -> None:
    """A request with an invalid value gets INVALID_ARGUMENT with the name of the field, and changes nothing."""
    before = world.keyed.ledger.snapshots.read()
    answer = await world.operator.refused(verb, request_)
    assert (answer.code.name, answer.reason, answer.fields) == ("INVALID_ARGUMENT", "INVALID_FIELD", [field]), answer
    after = world.keyed.ledger.snapshots.read()
    assert (after.tenants, after.keys) == (before.tenants, before.keys)


async def test_a_page_token_is_of_its_list_alone(world: World) -> None:
    """A page token that was made for another filter, tenant or method is refused, and no page token widens a caller's
    access."""
    page = await world.ask("Tenants.List", T.ListTenantsRequest(page_size=1))
    for request in (
        T.ListTenantsRequest(page_token=page.next_page_token, filter="origin = api"),
        T.ListTenantsRequest(page_token=page.next_page_token[:-2]),
    ):
        assert (await world.operator.refused("Tenants.List", request)).fields == ["page_token"]
    for verb, other in (
        ("Keys.List", T.ListKeysRequest(parent="tenants/ops", page_token=page.next_page_token)),
        ("Audit.List", U.ListAuditRequest(page_token=page.next_page_token)),
    ):
        assert (await world.operator.refused(verb, other)).fields == ["page_token"]


async def test_what_is_no_message(world: World) -> None:
    """A request of malformed bytes gets INVALID_ARGUMENT. A request of several megabytes is refused before it is
    read."""
    channel = world.operator.channel
    raw: Any = channel.unary_unary("/cluster.admin.v1.Tenants/Get")
    metadata = (("authorization", f"Bearer {world.key}"),)
    for data, code in ((b"\xff\xff", "INVALID_ARGUMENT"), (b"\x0a\x80" + b"x" * (2 << 20), "RESOURCE_EXHAUSTED")):
        call = raw(data, metadata=metadata, timeout=60)
        assert (await call.code()).name == code
    assert await world.operator.code("Tenants.Get", T.GetTenantRequest(name="tenants/ops")) == "OK"


async def test_tokens_that_are_none(world: World) -> None:
    """Truncated, expired, revoked, oversized and malformed credentials are all refused."""
    ledger, address = world.keyed.ledger, world.keyed.gateway.endpoints["admin"]
    late = await asyncio.to_thread(ledger.keys.create, "ops", "late", expires_at=time.time() + 0.2, role="operator")
    revoked = await asyncio.to_thread(ledger.keys.create, "ops", "revoked", role="operator")
    await asyncio.to_thread(ledger.keys.revoke, "ops", revoked.stored.id)
    request = T.ListTenantsRequest()
    deadline = time.monotonic() + 60
    for key in (world.key[:-1], late.secret, revoked.secret, "x" * 60_000, "", world.key.upper()):
        async with AdminClient(address, metadata=[("authorization", f"Bearer {key}")]) as client:
            while (code := await client.code("Tenants.List", request)) == "OK" and time.monotonic() < deadline:
                pass  # until the key has expired
            assert code == "UNAUTHENTICATED"
    async with AdminClient(address, "hr_" + "x" * (1 << 20)) as client:
        assert await client.code("Tenants.List", request) != "OK"
    two = [("authorization", f"Bearer {world.key}")] * 2
    for metadata in (two, [("authorization", world.key)], [("authorization", f"Basic {world.key}")]):
        async with AdminClient(address, metadata=metadata) as client:
            assert await client.code("Tenants.List", request) == "UNAUTHENTICATED"
    assert await world.operator.code("Tenants.List", request) == "OK"
