"""Commands about tenants: tenants, keys, usage, audit, db, import. They work on the ledger's database itself.

The database is that of --database-url, else of the file's store.database_url, else the local one in the cache folder.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
import yaml
from pydantic import BaseModel, ValidationError
from rich.markup import escape
from rich.table import Table

from cluster.cli.common import FAILED, UNREACHABLE_CODE, USAGE, JsonOption, fail, out, print_json
from cluster.config import cache_dir
from cluster.config_tenants import Auth, Cost, Store, TenantDefaults
from cluster.tenancy.policy import PolicyError

if TYPE_CHECKING:
    from cluster.ledger.keys import NewKey, StoredKey
    from cluster.ledger.store import Ledger
    from cluster.ledger.tenants import StoredTenant
    from cluster.ledger.usage import Rates

Section = TypeVar("Section", bound=BaseModel)
DAY_S = 86400.0
PAGE = 1000

tenants_app = typer.Typer(no_args_is_help=True, help="Tenants: who may use what, and how much of it.")
keys_app = typer.Typer(no_args_is_help=True, help="API keys of a tenant. A key is shown once, when it is made.")
db_app = typer.Typer(no_args_is_help=True, help="The ledger's database.")
import_app = typer.Typer(no_args_is_help=True, help="Bring tenants over from another system.")

UrlOption = Annotated[
    str | None,
    typer.Option("--database-url", help="The ledger's database.", show_default="the file's, else the local one"),
]
ConfigOption = Annotated[
    Path | None, typer.Option("-f", "--file", envvar="HEADRACE_CONFIG", help="The cluster.yaml.", dir_okay=False)
]
PepperOption = Annotated[
    Path | None, typer.Option("--pepper-file", help="The file of auth.api_keys.pepper_file.", dir_okay=False)
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.")]
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


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command needs of the configuration."""

    database_url: str
    local: bool
    pepper_file: Path
    defaults: TenantDefaults
    cost: Cost | None


def local_pepper() -> Path:
    """The local cluster's pepper; the only one that is made where it is missing."""
    return cache_dir() / "key-pepper"


def settings(file: Path | None, database_url: str | None, pepper_file: Path | None = None) -> Settings:
    """From options and the file's sections. Ends the command with exit code 2 when they are wrong."""
    data: Any = {}
    if file is not None:
        try:
            data = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            fail(f"{file}: cannot be read: {error}", USAGE)
        if not isinstance(data, dict):
            fail(f"{file}: is no mapping", USAGE)
    store, auth = _section(Store, data, "store", file), _section(Auth, data, "auth", file)
    url = database_url or (store.database_url if store else "")
    pepper = pepper_file or (auth.api_keys.pepper_file if auth and auth.api_keys else None) or local_pepper()
    defaults = _section(TenantDefaults, data, "tenant_defaults", file) or TenantDefaults()
    local = f"sqlite:///{cache_dir() / 'ledger.db'}"
    return Settings(url or local, not url, pepper, defaults, _section(Cost, data, "cost", file))


def _section(kind: type[Section], data: Mapping[str, Any], name: str, file: Path | None) -> Section | None:
    if data.get(name) is None:
        return None
    try:
        return kind.model_validate(data[name])
    except ValidationError as error:
        lines = [f"{file}: {'.'.join([name, *map(str, one['loc'])])}: {one['msg']}" for one in error.errors()]
        fail("\n".join(lines), USAGE)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What a ledger refuses becomes one line; exit code 3 when the database is away, 2 for a bad value, else 1."""
    from cluster.ledger.errors import LedgerError, StoreUnavailable

    try:
        yield
    except StoreUnavailable as error:
        fail(str(error), UNREACHABLE_CODE)
    except LedgerError as error:
        fail(str(error), USAGE if type(error) is LedgerError else FAILED)
    except (PolicyError, ValueError) as error:
        fail(str(error), USAGE)
    except OSError as error:
        fail(f"{error.filename or ''}: {error.strerror}")


@contextlib.contextmanager
def opened(chosen: Settings, *, keys: bool = False, check: bool = True) -> Iterator[Ledger]:
    """The ledger. The local one, and a new SQLite file, is made at its first use; others say what to run."""
    from cluster.ledger import files, migrate
    from cluster.ledger.store import Ledger

    with told():
        if chosen.local:
            cache_dir().mkdir(parents=True, exist_ok=True)
            if keys and chosen.pepper_file == local_pepper():
                files.make_secret(chosen.pepper_file)
        peppers = files.read_secrets(chosen.pepper_file, "auth.api_keys.pepper_file") if keys else ()
        ledger = Ledger(chosen.database_url, peppers=peppers)
        try:
            if check:
                if chosen.local and ledger.check().state is migrate.State.EMPTY:
                    ledger.upgrade()
                ledger.require_usable()
            yield ledger
        finally:
            ledger.close()


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
        changes["labels"] = dict(_pair(one, "--label") for one in label)
    for one in sets or []:
        path, value = _pair(one, "--set")
        place = changes
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = yaml.safe_load(value)
    return changes


def _pair(text: str, option: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        fail(f"{option} {text}: write name=value", USAGE)
    return name, value


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
    _table([{**row, "state": _key_state(one)} for row, one in zip(rows, found, strict=True)], "no keys")


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


def usage(
    group_by: Annotated[
        str, typer.Option("--group-by", help="tenant, model, day, month, key_id, label:x, …; commas between.")
    ] = "tenant,model",
    since: Annotated[str, typer.Option("--since", help="First day, UTC, like 2026-11-01.")] = "",
    until: Annotated[str, typer.Option("--until", help="Last day, included.")] = "",
    tenant: Annotated[str, typer.Option("--tenant", help="Of one tenant only.")] = "",
    model: Annotated[str, typer.Option("--model", help="Of one model only.")] = "",
    cost: Annotated[bool, typer.Option("--cost", help="Price GPU-seconds by the file's cost section.")] = False,
    gpu_hour: Annotated[list[str] | None, typer.Option("--gpu-hour", help="A rate: H100=2.40; repeats.")] = None,
    currency: Annotated[str, typer.Option("--currency", help="Of --gpu-hour.")] = "EUR",
    records: Annotated[bool, typer.Option("--records", help="Single calls in place of sums.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Sum what tenants have used."""
    from cluster.ledger import export
    from cluster.ledger.usage import UsageQuery

    chosen = settings(file, database_url)
    rates = _rates(chosen.cost, gpu_hour or [], currency) if cost or gpu_hour else None
    with opened(chosen) as ledger:
        names = tuple(part.strip() for part in group_by.split(",") if part.strip())
        wanted = UsageQuery(names, since_day=since, until_day=until, tenant=tenant, model=model)
        rows = _all_records(ledger, wanted) if records else ledger.usage.query(wanted, rates)
    if as_csv:
        typer.echo(export.as_csv(rows), nl=False)
    elif as_json:
        typer.echo(export.as_json(rows), nl=False)
    else:
        _table(rows, "no usage")


def _all_records(ledger: Ledger, wanted: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after = None
    while page := ledger.usage.records(wanted, after=after, limit=PAGE):
        rows += [one.as_json() for one in page]
        after = (page[-1].opened_at_s, page[-1].record_id)
    return rows


def _rates(cost: Cost | None, given: Sequence[str], currency: str) -> Rates:
    from cluster.ledger.usage import Rates

    if not given:
        if cost is None:
            fail("--cost needs rates: a cost section in the file (-f), or --gpu-hour", USAGE)
        return Rates(cost.currency, dict(cost.gpu_hour))
    try:
        hours = {gpu: float(rate) for gpu, rate in (_pair(one, "--gpu-hour") for one in given)}
        checked = Cost(currency=currency, gpu_hour=hours)
    except ValueError as error:
        fail(f"--gpu-hour: {error}", USAGE)
    return Rates(checked.currency, dict(checked.gpu_hour))


def audit(
    tenant: Annotated[str, typer.Option("--tenant", help="Of one tenant only.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="admin, auth_failure or policy.")] = "",
    since_days: Annotated[float, typer.Option("--since-days", help="Of the last days.", min=0)] = 30.0,
    limit: Annotated[int, typer.Option("--limit", help="At most so many, newest first.", min=1, max=100_000)] = 100,
    as_json: JsonOption = False,
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Show who did what and why, newest first."""
    with opened(settings(file, database_url)) as ledger:
        since_s = time.time() - since_days * DAY_S
        rows = ledger.audit.list(tenant=tenant, kind=kind, since_s=since_s, limit=limit)
    if as_json:
        print_json(rows)
        return
    names = ("action", "actor", "object", "outcome", "reason")
    _table([{"at": _time(row["at_s"]), **{name: row[name] for name in names}} for row in rows], "no events")


@db_app.command("upgrade")
def upgrade_db(
    contract: Annotated[bool, typer.Option("--contract", help="Also take away what only older releases use.")] = False,
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Bring the tables up to this release."""
    with opened(settings(file, database_url), check=False) as ledger:
        applied = ledger.upgrade(contract=contract)
        found = ledger.check()
    out.print(f"applied {', '.join(applied)}" if applied else "nothing to apply", markup=False)
    out.print(found.message(), markup=False)


@db_app.command("check")
def check_db(file: ConfigOption = None, database_url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Say how the tables stand to this release; exit code 1 when it cannot work on them."""
    with opened(settings(file, database_url), check=False) as ledger:
        found = ledger.check()
    if as_json:
        shown = {"state": found.state.value, "database": found.database, "release": found.release}
        print_json({**shown, "usable": found.usable, "pending": found.pending, "differences": found.differences})
    else:
        out.print(found.message(), markup=False)
    raise typer.Exit(0 if found.usable else FAILED)


@db_app.command("backup")
def backup_db(
    target: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Write everything into one file, as of one moment."""
    with opened(settings(file, database_url)) as ledger:
        counts = ledger.backup(target)
    out.print(f"{target}: {', '.join(f'{rows} {name}' for name, rows in counts.items())}", markup=False)


@db_app.command("restore")
def restore_db(
    source: Annotated[Path, typer.Argument(help="A backup.", show_default=False)],
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Read a backup into an empty database, whole or not at all."""
    with opened(settings(file, database_url), check=False) as ledger:
        counts = ledger.restore(source)
    out.print(f"restored {', '.join(f'{rows} {name}' for name, rows in counts.items())}", markup=False)


@import_app.callback()
def _import() -> None:
    """Bring tenants over from another system."""


@import_app.command("litellm")
def import_litellm(
    database_url: Annotated[str, typer.Option("--database-url", help="LiteLLM's database.", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would come over and what does not.")
    ] = False,
    tokens_per_dollar: Annotated[
        float | None, typer.Option("--tokens-per-dollar", help="Turns budgets of money into tokens.", min=1)
    ] = None,
    ledger_url: Annotated[
        str | None, typer.Option("--ledger-url", help="Our database.", show_default="the file's, else the local one")
    ] = None,
    file: ConfigOption = None,
    pepper_file: PepperOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take over teams, key hashes, limits, budgets and aliases of LiteLLM; no tenant changes a key."""
    from cluster.ledger import import_litellm as litellm

    with told():
        made = litellm.plan(litellm.read(database_url), time.time(), tokens_per_dollar=tokens_per_dollar)
    shown: dict[str, Any] = {
        "tenants": [one.policy.as_json() | {"source": one.source} for one in made.tenants],
        "keys": len(made.keys),
        "does_not_map": list(made.notes),
    }
    if not dry_run:
        with opened(settings(file, ledger_url, pepper_file), keys=True) as ledger:
            done = litellm.apply(made, ledger)
            ledger.record("import.litellm", "tenants", reason=f"{done.tenants} tenants, {done.keys} keys")
        shown |= {"made_tenants": done.tenants, "made_keys": done.keys, "skipped": list(done.skipped)}
    if as_json:
        print_json(shown)
        return
    out.print(f"{'would make' if dry_run else 'planned'} {len(made.tenants)} tenants and {len(made.keys)} keys")
    if not dry_run:
        out.print(f"made {shown['made_tenants']} tenants and {shown['made_keys']} keys")
    for title, lines in (("does not map", made.notes), ("skipped", shown.get("skipped", []))):
        for line in lines:
            out.print(f"{title}: {line}", markup=False)


def register(app: typer.Typer) -> None:
    """Add all of these commands."""
    app.add_typer(tenants_app, name="tenants")
    app.add_typer(keys_app, name="keys")
    app.add_typer(db_app, name="db")
    app.add_typer(import_app, name="import")
    app.command()(usage)
    app.command()(audit)


def _expiry(days: float | None) -> float | None:
    return None if days is None else time.time() + days * DAY_S


def _time(at_s: float | None) -> str:
    if at_s is None:
        return ""
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _plain_key(key: StoredKey) -> dict[str, Any]:
    times = {"created_at": key.created_at, "expires_at": key.expires_at, "revoked_at": key.revoked_at}
    named = {"id": key.id, "tenant": key.tenant, "name": key.name, "role": key.role}
    return {**named, **{name: _time(at_s) for name, at_s in times.items()}, "rotated_from": key.rotated_from}


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
    _table(table, "no tenants")


def _table(rows: Sequence[Mapping[str, Any]], nothing: str) -> None:
    if not rows:
        out.print(nothing)
        return
    table = Table(*map(escape, rows[0]), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    out.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
