"""Commands about tenants and their API keys. They work on the ledger's database itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from cluster.cli.common import USAGE, JsonOption, fail, out, print_json
from cluster.cli.ledger import (
    DAY_S,
    PAGE,
    ConfigOption,
    PepperOption,
    ReasonOption,
    Settings,
    UrlOption,
    opened,
    pair,
    settings,
    show_table,
    shown_time,
)
from cluster.config_tenants import on_is_a_word

if TYPE_CHECKING:
    from cluster.ledger.keys import NewKey, StoredKey
    from cluster.ledger.tenants import StoredTenant

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
def create_tenant(
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a tenant: the file's tenant_defaults, and over them what is given here."""
    chosen = settings(file, database_url)
    with opened(chosen) as ledger:
        policy = chosen.defaults.policy(name, _changes(class_, weight, model, label, sets))
        made = ledger.tenants.create(policy)
        ledger.record("tenants.create", f"tenants/{name}", tenant=name, reason=reason)
    _show_tenants([made], as_json, one=True)


@tenants_app.command("get")
def get_tenant(
    name: NameArgument, file: ConfigOption = None, database_url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """Show one tenant."""
    with opened(settings(file, database_url)) as ledger:
        found = ledger.tenants.get(name)
    _show_tenants([found], as_json, one=True)


@tenants_app.command("list")
def list_tenants(file: ConfigOption = None, database_url: UrlOption = None, as_json: JsonOption = False) -> None:
    """List all tenants."""
    found: list[StoredTenant] = []
    with opened(settings(file, database_url)) as ledger:
        while page := ledger.tenants.list(after=found[-1].policy.name if found else "", limit=PAGE):
            found += page
    _show_tenants(found, as_json)


@tenants_app.command("update")
def update_tenant(
    name: NameArgument,
    class_: ClassOption = None,
    weight: WeightOption = None,
    model: ModelOption = None,
    label: LabelOption = None,
    sets: SetOption = None,
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is given; the rest stays. A value of null takes away: --set limits.daily_tokens=null"""
    changes = _changes(class_, weight, model, label, sets)
    if not changes:
        fail("nothing to change is given", USAGE)
    with opened(settings(file, database_url)) as ledger:
        changed = ledger.tenants.update(name, changes)
        ledger.record("tenants.update", f"tenants/{name}", tenant=name, reason=reason)
    _show_tenants([changed], as_json, one=True)


@tenants_app.command("suspend")
def suspend_tenant(
    name: NameArgument, reason: ReasonOption = "", file: ConfigOption = None, database_url: UrlOption = None
) -> None:
    """Stop a tenant's calls, everywhere within two seconds."""
    _suspend(name, True, reason, settings(file, database_url))


@tenants_app.command("resume")
def resume_tenant(
    name: NameArgument, reason: ReasonOption = "", file: ConfigOption = None, database_url: UrlOption = None
) -> None:
    """Let a suspended tenant call again."""
    _suspend(name, False, reason, settings(file, database_url))


def _suspend(name: str, suspended: bool, reason: str, chosen: Settings) -> None:
    with opened(chosen) as ledger:
        ledger.tenants.suspend(name, suspended)
        action = "tenants.suspend" if suspended else "tenants.resume"
        ledger.record(action, f"tenants/{name}", tenant=name, reason=reason)
    out.print(f"{'suspended' if suspended else 'resumed'} {name}", markup=False)


@tenants_app.command("delete")
def delete_tenant(
    name: NameArgument,
    erase: Annotated[
        bool, typer.Option("--erase", help="Remove its usage and audit rows too; not to be undone.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Take a tenant away: its keys stop at once. Its usage stays unless it is erased."""
    if erase and not yes:
        typer.confirm(f"Erase every record of {name}? This cannot be undone", abort=True)
    with opened(settings(file, database_url)) as ledger:
        if erase:
            from cluster.ledger.tenants import digest_of_name

            rows = ledger.erase(name)
            # who erased and why stays; whose name it was does not
            ledger.record("tenants.erase", f"tenants/{digest_of_name(name)[:16]}", reason=reason.replace(name, "…"))
            out.print(f"erased {name}: {rows} rows", markup=False)
        else:
            ledger.tenants.delete(name)
            ledger.record("tenants.delete", f"tenants/{name}", tenant=name, reason=reason)
            out.print(f"deleted {name}", markup=False)


@keys_app.command("create")
def create_key(
    tenant: NameArgument,
    name: Annotated[str, typer.Option("--name", help="What it is for.")] = "",
    expires_days: Annotated[float | None, typer.Option("--expires-days", help="Days until it expires.")] = None,
    role: Annotated[str, typer.Option("--role", help="caller, viewer, tenant_admin or operator.")] = "caller",
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
    pepper_file: PepperOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, this once."""
    with opened(settings(file, database_url, pepper_file), keys=True) as ledger:
        made = ledger.keys.create(tenant, name, expires_at=_expiry(expires_days), role=role)
        ledger.record("keys.create", f"tenants/{tenant}/keys/{made.stored.id}", tenant=tenant, reason=reason)
    _show_new_key(made, as_json)


@keys_app.command("list")
def list_keys(
    tenant: NameArgument, file: ConfigOption = None, database_url: UrlOption = None, as_json: JsonOption = False
) -> None:
    """List a tenant's keys; the keys themselves nobody can read."""
    with opened(settings(file, database_url)) as ledger:
        found = ledger.keys.list(tenant)
    rows = [_plain_key(one) for one in found]
    if as_json:
        print_json(rows)
        return
    show_table([{**row, "state": _key_state(one)} for row, one in zip(rows, found, strict=True)], "no keys")


@keys_app.command("rotate")
def rotate_key(
    tenant: NameArgument,
    key: KeyArgument,
    overlap_s: Annotated[
        float, typer.Option("--overlap-s", help="Seconds for which the old key still works.", min=0)
    ] = DAY_S,
    expires_days: Annotated[float | None, typer.Option("--expires-days", help="Days until the new expires.")] = None,
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
    pepper_file: PepperOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key's successor and show it, this once; the old key goes on for a while."""
    with opened(settings(file, database_url, pepper_file), keys=True) as ledger:
        made = ledger.keys.rotate(tenant, key, overlap_s=overlap_s, expires_at=_expiry(expires_days))
        ledger.record("keys.rotate", f"tenants/{tenant}/keys/{key}", tenant=tenant, reason=reason)
    _show_new_key(made, as_json)


@keys_app.command("revoke")
def revoke_key(
    tenant: NameArgument,
    key: KeyArgument,
    reason: ReasonOption = "",
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """End a key, everywhere within two seconds."""
    with opened(settings(file, database_url)) as ledger:
        ledger.keys.revoke(tenant, key)
        ledger.record("keys.revoke", f"tenants/{tenant}/keys/{key}", tenant=tenant, reason=reason)
    out.print(f"revoked {key}", markup=False)


def _expiry(days: float | None) -> float | None:
    return None if days is None else time.time() + days * DAY_S


def _plain_key(key: StoredKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
    named = {"id": key.id, "tenant": key.tenant, "name": key.name, "role": key.role}
    return {**named, **{name: shown_time(at_s) for name, at_s in times.items()}, "rotated_from": key.rotated_from}


def _key_state(key: StoredKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= time.time() else "active"


def _show_new_key(made: NewKey, as_json: bool) -> None:
    if as_json:
        print_json({**_plain_key(made.stored), "key": made.secret})
        return
    typer.echo(made.secret)
    typer.echo(f"key {made.stored.id} of {made.stored.tenant}; keep it now, it is not shown again", err=True)


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
