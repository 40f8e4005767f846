"""Commands about tenants and their API keys; see tenant_service.py for where they work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer
import yaml

from cluster.cli import terminal
from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.ledger import DAY_S, ReasonOption, RequiredReasonOption, pair, show_table, shown_time
from cluster.cli.tenant_service import at_desk
from cluster.config.tenants import on_is_a_word
from cluster.ledger.rows import NewKey, StoredKey, StoredTenant, key_state
from cluster.ledger.tenants.service import ROTATION_S, TenantService

tenants_app = typer.Typer(no_args_is_help=True, help="Tenants: who may use what, and how much of it.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of a tenant. A key is shown once, when it is made.")

NameArgument = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
KeyArgument = Annotated[str, typer.Argument(help="The key's id.", show_default=False)]
ClassOption = Annotated[str | None, typer.Option("--class", help="Priority class.")]
WeightOption = Annotated[float | None, typer.Option("--weight", help="Share among tenants of its class.")]
ModelOption = Annotated[list[str] | None, typer.Option("--model", help="A model, alias or glob; repeats.")]
LabelOption = Annotated[list[str] | None, typer.Option("--label", help="name=value; repeats.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any field as in the configuration: limits.tokens_per_minute=5000; repeats."),
]


def _changes(
    class_: str | None, weight: float | None, model: list[str] | None, label: list[str] | None, sets: list[str] | None
) -> dict[str, Any]:
    """The fields that options give, by the configuration's names."""
    changes: dict[str, Any] = {}
    if class_ is not None:
        changes["class"] = class_
    if weight is not None:
        changes["weight"] = weight
    if model:
        changes["models"] = model
    if label:
        changes["labels"] = dict(pair(one, "--label") for one in label)
    for one in sets or []:
        path, value = pair(one, "--set")
        place = changes
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = on_is_a_word(yaml.safe_load(value))
    return changes


@tenants_app.command("create")
@at_desk()
def create_tenant(
    desk: TenantService,
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a tenant: the configuration's tenant_defaults, and over them what is given here."""
    made = desk.create_tenant(name, _changes(class_, weight, model, label, sets), reason=reason)
    _show_tenants([made], as_json, one=True)


@tenants_app.command("get")
@at_desk()
def get_tenant(desk: TenantService, name: NameArgument, as_json: JsonOption = False) -> None:
    """Show one tenant."""
    _show_tenants([desk.get_tenant(name)], as_json, one=True)


@tenants_app.command("list")
@at_desk()
def list_tenants(desk: TenantService, as_json: JsonOption = False) -> None:
    """List all tenants."""
    _show_tenants(list(desk.tenants()), as_json)


@tenants_app.command("update")
@at_desk()
def update_tenant(
    desk: TenantService,
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change what is given; the rest stays. A value of null takes away: --set limits.daily_tokens=null"""
    changes = _changes(class_, weight, model, label, sets)
    if not changes:
        fail("nothing to change is given", USAGE)
    _show_tenants([desk.update_tenant(name, changes, reason=reason)], as_json, one=True)


@tenants_app.command("suspend")
@at_desk()
def suspend_tenant(desk: TenantService, name: NameArgument, reason: RequiredReasonOption) -> None:
    """Stop a tenant's calls, everywhere within two seconds."""
    desk.suspend_tenant(name, True, reason=reason)
    out.print(f"suspended {name}", markup=False)


@tenants_app.command("resume")
@at_desk()
def resume_tenant(desk: TenantService, name: NameArgument, reason: ReasonOption = "") -> None:
    """Let a suspended tenant call again."""
    desk.suspend_tenant(name, False, reason=reason)
    out.print(f"resumed {name}", markup=False)


@tenants_app.command("delete")
@at_desk()
def delete_tenant(
    desk: TenantService,
    name: NameArgument,
    reason: RequiredReasonOption,
    erase: Annotated[
        bool, typer.Option("--erase", help="Remove its usage and audit rows too; not to be undone.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Take a tenant away: its keys stop at once. Its usage stays unless it is erased."""
    if erase and not yes:
        typer.confirm(f"Erase every record of {name}? This cannot be undone", abort=True)
    rows = desk.delete_tenant(name, erase=erase, reason=reason)
    out.print(f"erased {name}: {rows} rows" if erase else f"deleted {name}", markup=False)


@keys_app.command("create")
@at_desk(keys=True)
def create_key(
    desk: TenantService,
    tenant: NameArgument,
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    expires_days: Annotated[float | None, typer.Option("--expires-days", help="Days until it expires.")] = None,
    role: Annotated[str, typer.Option("--role", help="caller, viewer, tenant_admin or operator.")] = "caller",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, this once."""
    made = desk.create_key(tenant, name, expires_at=_expiry(expires_days), role=role, reason=reason)
    _show_new_key(made, as_json)


@keys_app.command("list")
@at_desk()
def list_keys(desk: TenantService, tenant: NameArgument, as_json: JsonOption = False) -> None:
    """List a tenant's keys; the keys themselves nobody can read."""
    found = desk.keys(tenant)
    rows = [_plain_key(one) for one in found]
    if as_json:
        print_json(rows)
        return
    now_s = time.time()
    show_table([{**row, "state": key_state(one, now_s)} for row, one in zip(rows, found, strict=True)], "no keys")


@keys_app.command("rotate")
@at_desk(keys=True)
def rotate_key(
    desk: TenantService,
    tenant: NameArgument,
    key: KeyArgument,
    overlap_s: Annotated[
        float, typer.Option("--overlap-s", help="Seconds for which the old key still works.", min=0)
    ] = ROTATION_S,
    expires_days: Annotated[float | None, typer.Option("--expires-days", help="Days until the new expires.")] = None,
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key's successor and show it, this once; the old key goes on for a while."""
    made = desk.rotate_key(tenant, key, overlap_s=overlap_s, expires_at=_expiry(expires_days), reason=reason)
    _show_new_key(made, as_json)


@keys_app.command("revoke")
@at_desk()
def revoke_key(desk: TenantService, tenant: NameArgument, key: KeyArgument, reason: RequiredReasonOption) -> None:
    """End a key, everywhere within two seconds."""
    desk.revoke_key(tenant, key, reason=reason)
    out.print(f"revoked {key}", markup=False)


def _expiry(days: float | None) -> float | None:
    return None if days is None else time.time() + days * DAY_S


def _plain_key(key: StoredKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
    named = {"id": key.id, "tenant": key.tenant, "name": key.name, "role": key.role}
    return {**named, **{name: shown_time(at_s) for name, at_s in times.items()}, "rotated_from": key.rotated_from}


def _show_new_key(made: NewKey, as_json: bool) -> None:
    if as_json:
        print_json({**_plain_key(made.stored), "key": made.secret})
        return
    terminal.say(made.secret)
    terminal.say(f"key {made.stored.id} of {made.stored.tenant}; keep it now, it is not shown again", error=True)


def _show_tenants(found: Sequence[StoredTenant], as_json: bool, *, one: bool = False) -> None:
    rows = [
        {**entry.policy.as_json(), "origin": entry.origin, "model_aliases": dict(entry.model_aliases)}
        for entry in found
    ]
    if as_json:
        print_json(rows[0] if one else rows)
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
