"""Commands for tenants and API keys. The commands use the database or a gateway's admin API (see tenant_service.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml

from cluster.cli import terminal
from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.confirmation import YesOption, confirm
from cluster.cli.ledger import DAY_S, ReasonOption, RequiredReasonOption, show_table, shown_time, split_pair
from cluster.cli.tenant_service import with_tenant_service
from cluster.config.tenants import restore_on_key
from cluster.ledger.rows import NewKey, StoredKey, StoredTenant, key_state
from cluster.ledger.tenants.service import DEFAULT_OVERLAP_S, TenantService

tenants_app = typer.Typer(no_args_is_help=True, help="Create and change tenants: models, limits, classes.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of tenants. A key is shown only when it is created.")

NameArgument = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(help="The key's id.", show_default=False)]
ClassOption = Annotated[
    str | None, typer.Option("--class", help="Priority class, one of the configuration's `classes`.")
]
WeightOption = Annotated[
    float | None,
    typer.Option("--weight", help="Share of capacity, relative to other tenants of its class: 2 gets twice that of 1."),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model", help="A model that the tenant may use, by name, alias or glob; repeatable."),
]
LabelOption = Annotated[list[str] | None, typer.Option("--label", help="A label, name=value; repeatable.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field as in the configuration: limits.tokens_per_minute=5000; repeatable."),
]


def _changes(
    class_: str | None, weight: float | None, model: list[str] | None, label: list[str] | None, sets: list[str] | None
) -> dict[str, Any]:
    """Return the fields that the options set, under the names of the configuration."""
    changes: dict[str, Any] = {}
    if class_ is not None:
        changes["class"] = class_
    if weight is not None:
        changes["weight"] = weight
    if model:
        changes["models"] = model
    if label:
        changes["labels"] = dict(split_pair(text, "--label") for text in label)
    for text in sets or []:
        path, value = split_pair(text, "--set")
        place = changes
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = restore_on_key(yaml.safe_load(value))
    return changes


@tenants_app.command("create")
@with_tenant_service()
def create_tenant(
    service: TenantService,
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Create a tenant. For an option that is not given, the value in the configuration's tenant_defaults is used."""
    tenant = service.create_tenant(name, _changes(class_, weight, model, label, sets), reason=reason)
    _show_tenants([tenant], as_json, single=True)


@tenants_app.command("get")
@with_tenant_service()
def get_tenant(service: TenantService, name: NameArgument, as_json: JsonOption = False) -> None:
    """Show one tenant."""
    _show_tenants([service.get_tenant(name)], as_json, single=True)


@tenants_app.command("list")
@with_tenant_service()
def list_tenants(service: TenantService, as_json: JsonOption = False) -> None:
    """List all tenants."""
    _show_tenants(list(service.tenants()), as_json)


@tenants_app.command("update")
@with_tenant_service()
def update_tenant(
    service: TenantService,
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change the given fields of a tenant. The rest stays. null removes a value: --set limits.daily_tokens=null"""
    changes = _changes(class_, weight, model, label, sets)
    if not changes:
        fail("nothing to change: give --class, --weight, --model, --label or --set", USAGE)
    _show_tenants([service.update_tenant(name, changes, reason=reason)], as_json, single=True)


@tenants_app.command("suspend")
@with_tenant_service()
def suspend_tenant(
    service: TenantService, name: NameArgument, reason: RequiredReasonOption, yes: YesOption = False
) -> None:
    """Suspend a tenant and stop its calls. All gateways do so within two seconds. Undo with `tenants resume`."""
    confirm(f"Suspend {name} and stop its running calls?", yes)
    service.suspend_tenant(name, True, reason=reason)
    out.print(f"suspended {name}", markup=False)


@tenants_app.command("resume")
@with_tenant_service()
def resume_tenant(service: TenantService, name: NameArgument, reason: ReasonOption = "") -> None:
    """Resume a suspended tenant."""
    service.suspend_tenant(name, False, reason=reason)
    out.print(f"resumed {name}", markup=False)


@tenants_app.command("delete")
@with_tenant_service()
def delete_tenant(
    service: TenantService,
    name: NameArgument,
    reason: RequiredReasonOption,
    erase: Annotated[
        bool, typer.Option("--erase", help="Also remove its usage and audit rows; cannot be undone.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Delete a tenant: its keys stop working at once. Undo with `tenants undelete`, unless --erase is given."""
    if erase:
        confirm(f"Erase every record of {name}? This cannot be undone.", yes, required=True)
    else:
        confirm(f"Delete the tenant {name} and all its keys?", yes)
    rows = service.delete_tenant(name, erase=erase, reason=reason)
    out.print(f"erased {name}: {rows} rows" if erase else f"deleted {name}", markup=False)


@tenants_app.command("undelete")
@with_tenant_service()
def undelete_tenant(
    service: TenantService, name: NameArgument, reason: ReasonOption = "", as_json: JsonOption = False
) -> None:
    """Bring a deleted tenant back with its limits and keys."""
    _show_tenants([service.undelete_tenant(name, reason=reason)], as_json, single=True)


@keys_app.command("create")
@with_tenant_service(keys=True)
def create_key(
    service: TenantService,
    tenant: NameArgument,
    name: Annotated[str, typer.Option("--name", help="A display name, such as its purpose.")] = "",
    expires_days: Annotated[float | None, typer.Option("--expires-days", help="Days until it expires.")] = None,
    role: Annotated[str, typer.Option("--role", help="caller, viewer, tenant_admin or operator.")] = "caller",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Create a key, and show it once."""
    key = service.create_key(tenant, name, expires_at=_expiry(expires_days), role=role, reason=reason)
    _show_new_key(key, as_json)


@keys_app.command("list")
@with_tenant_service()
def list_keys(service: TenantService, tenant: NameArgument, as_json: JsonOption = False) -> None:
    """List a tenant's keys, without the secrets, which are not stored."""
    keys = service.keys(tenant)
    rows = [_plain_key(key) for key in keys]
    if as_json:
        print_json(rows)
        return
    now_s = time.time()
    show_table([{**row, "state": key_state(key, now_s)} for row, key in zip(rows, keys, strict=True)], "no keys")


@keys_app.command("rotate")
@with_tenant_service(keys=True)
def rotate_key(
    service: TenantService,
    tenant: NameArgument,
    key: KeyArgument,
    overlap_s: Annotated[
        float, typer.Option("--overlap-s", help="Seconds during which the old key still works.", min=0)
    ] = DEFAULT_OVERLAP_S,
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", help="Days until the new key expires.")
    ] = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Replace a key by a new one, and show the new one once. The old key works for --overlap-s more seconds."""
    new_key = service.rotate_key(tenant, key, overlap_s=overlap_s, expires_at=_expiry(expires_days), reason=reason)
    _show_new_key(new_key, as_json)


@keys_app.command("revoke")
@with_tenant_service()
def revoke_key(
    service: TenantService,
    tenant: NameArgument,
    key: KeyArgument,
    reason: RequiredReasonOption,
    yes: YesOption = False,
) -> None:
    """Revoke a key: all gateways refuse it within two seconds."""
    confirm(f"Revoke the key {key} of {tenant}? This cannot be undone.", yes)
    service.revoke_key(tenant, key, reason=reason)
    out.print(f"revoked {key}", markup=False)


def _expiry(days: float | None) -> float | None:
    return None if days is None else time.time() + days * DAY_S


def _plain_key(key: StoredKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
    named = {"id": key.id, "tenant": key.tenant, "name": key.name, "role": key.role}
    return {**named, **{name: shown_time(at_s) for name, at_s in times.items()}, "rotated_from": key.rotated_from}


def _show_new_key(key: NewKey, as_json: bool) -> None:
    if as_json:
        print_json({**_plain_key(key.stored), "key": key.secret})
        return
    terminal.say(key.secret)
    terminal.say(f"key {key.stored.id} of {key.stored.tenant}; save it now, it is not shown again", error=True)


def _show_tenants(tenants: Sequence[StoredTenant], as_json: bool, *, single: bool = False) -> None:
    rows = [
        {**tenant.policy.as_json(), "origin": tenant.origin, "model_aliases": dict(tenant.model_aliases)}
        for tenant in tenants
    ]
    if as_json:
        print_json(rows[0] if single else rows)
        return
    table = []
    for row in rows:
        limits = ", ".join(f"{name}={value}" for name, value in row["limits"].items() if value is not None)
        state = "suspended" if row["suspended"] else "active"
        brief = {name: row[name] for name in ("name", "class", "weight")}
        table.append(
            {**brief, "state": state, "models": ", ".join(row["models"]), "limits": limits, "origin": row["origin"]}
        )
    show_table(table, "no tenants")
