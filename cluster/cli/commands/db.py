"""Commands about the ledger's database: its tables, backups, and tenants brought over from another system."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.common import FAILED, JsonOption, out, print_json
from cluster.cli.ledger import ConfigOption, PepperOption, UrlOption, opened, settings, told

db_app = typer.Typer(no_args_is_help=True, help="The ledger's database.")
import_app = typer.Typer(no_args_is_help=True, help="Bring tenants over from another system.")


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
    from cluster.ledger.tenants import import_litellm as litellm

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
