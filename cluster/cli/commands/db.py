"""Commands for the ledger's database: schema upgrades, backups, and import of tenants from another system."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.common import FAILED, JsonOption, out, print_json
from cluster.cli.confirmation import YesOption, confirm
from cluster.cli.ledger import ConfigOption, PepperOption, UrlOption, ledger_errors, open_ledger, read_settings

db_app = typer.Typer(no_args_is_help=True, help="Upgrade, check, back up and restore the ledger's database.")
import_app = typer.Typer(no_args_is_help=True, help="Import tenants from another system.")


@db_app.command("upgrade")
def upgrade_db(
    contract: Annotated[
        bool,
        typer.Option("--contract", help="Also drop what only older releases use: there is no way back to them."),
    ] = False,
    file: ConfigOption = None,
    database_url: UrlOption = None,
    yes: YesOption = False,
) -> None:
    """Upgrade the database schema to this release."""
    if contract:
        confirm("Drop the tables and columns that only older releases use? They cannot run afterwards.", yes)
    with open_ledger(read_settings(file, database_url), check=False) as ledger:
        applied = ledger.upgrade(contract=contract)
        status = ledger.check()
    out.print(f"applied {', '.join(applied)}" if applied else "nothing to apply", markup=False)
    out.print(status.message(), markup=False)


@db_app.command("check")
def check_db(file: ConfigOption = None, database_url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Compare the database schema with this release. Exit code 1 if this release cannot use it."""
    with open_ledger(read_settings(file, database_url), check=False) as ledger:
        status = ledger.check()
    if as_json:
        versions = {"state": status.state.value, "database": status.database, "release": status.release}
        print_json({**versions, "usable": status.usable, "pending": status.pending, "differences": status.differences})
    else:
        out.print(status.message(), markup=False)
    raise typer.Exit(0 if status.usable else FAILED)


@db_app.command("backup")
def backup_db(
    target: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Back up the whole ledger into one file, as a consistent snapshot."""
    with open_ledger(read_settings(file, database_url)) as ledger:
        counts = ledger.backup(target)
    out.print(f"{target}: {', '.join(f'{rows} {name}' for name, rows in counts.items())}", markup=False)


@db_app.command("restore")
def restore_db(
    source: Annotated[Path, typer.Argument(help="A backup.", show_default=False)],
    file: ConfigOption = None,
    database_url: UrlOption = None,
) -> None:
    """Restore a backup into an empty database, in one transaction."""
    with open_ledger(read_settings(file, database_url), check=False) as ledger:
        counts = ledger.restore(source)
    out.print(f"restored {', '.join(f'{rows} {name}' for name, rows in counts.items())}", markup=False)


@import_app.callback()
def _import() -> None:
    """Import tenants from another system."""


@import_app.command("litellm")
def import_litellm(
    database_url: Annotated[
        str,
        typer.Option(
            "--database-url",
            help="LiteLLM's database. The password may be in HEADRACE_LITELLM_PASSWORD.",
            show_default=False,
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only report what would be imported and what cannot be.")
    ] = False,
    tokens_per_dollar: Annotated[
        float | None,
        typer.Option("--tokens-per-dollar", help="Rate that turns money budgets into token budgets.", min=1),
    ] = None,
    ledger_url: Annotated[
        str | None,
        typer.Option("--ledger-url", help="The ledger's database.", show_default="the file's, else the local one"),
    ] = None,
    file: ConfigOption = None,
    pepper_file: PepperOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import teams, keys, limits, budgets and aliases of LiteLLM. Tenants keep their keys."""
    from cluster.ledger.tenants import import_litellm as litellm

    with ledger_errors():
        plan = litellm.plan(litellm.read(database_url), time.time(), tokens_per_dollar=tokens_per_dollar)
    summary: dict[str, Any] = {
        "tenants": [tenant.policy.as_json() | {"source": tenant.source} for tenant in plan.tenants],
        "keys": len(plan.keys),
        "does_not_map": list(plan.notes),
    }
    if not dry_run:
        with open_ledger(read_settings(file, ledger_url, pepper_file), keys=True) as ledger:
            done = litellm.apply(plan, ledger)
            ledger.record("import.litellm", "tenants", reason=f"{done.tenants} tenants, {done.keys} keys")
        summary |= {"made_tenants": done.tenants, "made_keys": done.keys, "skipped": list(done.skipped)}
    if as_json:
        print_json(summary)
        return
    out.print(f"{'would make' if dry_run else 'planned'} {len(plan.tenants)} tenants and {len(plan.keys)} keys")
    if not dry_run:
        out.print(f"made {summary['made_tenants']} tenants and {summary['made_keys']} keys")
    for title, lines in (("does not map", plan.notes), ("skipped", summary.get("skipped", []))):
        for line in lines:
            out.print(f"{title}: {line}", markup=False)
