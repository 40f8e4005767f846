"""Helpers of the tenant commands: open the ledger, turn ledger errors into exit codes, print rows.

The database's URL comes from the first of these sources that has one: the option --database-url, store.database_url in
the -f file, the configuration of the running local cluster. Otherwise the database is the SQLite file in the cache
folder.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.markup import escape
from rich.table import Table

from cluster.cli.common import FAILED, UNREACHABLE_CODE, USAGE, fail, local_run, out, read_config
from cluster.config.paths import cache_dir
from cluster.config.tenants import Auth, Cost, Store, TenantDefaults
from cluster.config.yaml_reader import NotYaml, load
from cluster.ledger.rows import Prices
from cluster.ledger.slo import SloObjective
from cluster.policy.tenants.policy import PolicyError
from cluster.process.private_files import make_private_folder

if TYPE_CHECKING:
    from cluster.ledger.store import Ledger

Section = TypeVar("Section", bound=BaseModel)
DAY_S = 86400.0
PAGE = 1000

UrlOption = Annotated[
    str | None,
    typer.Option("--database-url", help="The ledger's database.", show_default="the file's, else the local one"),
]
ConfigOption = Annotated[
    Path | None, typer.Option("-f", "--file", envvar="HEADRACE_CONFIG", help="The cluster.yaml.", dir_okay=False)
]
PepperOption = Annotated[
    Path | None,
    typer.Option(
        "--pepper-file",
        help="The file with the pepper of API keys.",
        show_default="the file's, else the local one",
        dir_okay=False,
    ),
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.")]
RequiredReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings that a ledger command reads from the configuration.

    `local`: the database is the SQLite file in the cache folder. `made_here`: the database is a SQLite file, in the
    cache folder or named in the configuration, that a command creates if it is missing. `file_without_auth`: the
    configuration file that was read, if it has no section `auth`.
    """

    database_url: str
    local: bool
    made_here: bool
    pepper_file: Path
    defaults: TenantDefaults
    cost: Cost | None
    file_without_auth: Path | None = None

    @property
    def rates(self) -> Prices | None:
        """Prices from the file's `cost` section, or None if the file has no such section."""
        return Prices(self.cost.currency, dict(self.cost.gpu_hour)) if self.cost else None


def local_pepper() -> Path:
    """Return the path of local clusters' pepper file, the only pepper file that a command may create."""
    return cache_dir() / "key-pepper"


def read_settings(file: Path | None, database_url: str | None, pepper_file: Path | None = None) -> Settings:
    """Read the ledger settings from the options and the file.

    Without a file and a database URL, the settings of the local cluster that is up are read. Invalid settings end the
    command with exit code 2.
    """
    data: Any = {}
    if file is None and database_url is None and (run := local_run()) is not None and run.config_file.exists():
        file = run.config_file
    if file is not None:
        try:
            data = load(file.read_text())
        except (OSError, UnicodeDecodeError, NotYaml) as error:
            fail(f"{file}: cannot be read: {error}", USAGE)
        if not isinstance(data, dict):
            fail(f"{file}: expected a mapping of keys, the cluster.yaml", USAGE)
    store, auth = _section(Store, data, "store", file), _section(Auth, data, "auth", file)
    url = database_url or (store.database_url if store else "")
    pepper = pepper_file or (auth.api_keys.pepper_file if auth and auth.api_keys else None) or local_pepper()
    defaults = _section(TenantDefaults, data, "tenant_defaults", file) or TenantDefaults()
    local = f"sqlite:///{cache_dir() / 'ledger.db'}"
    made_here = not url or (not database_url and url.startswith("sqlite"))
    cost = _section(Cost, data, "cost", file)
    return Settings(url or local, not url, made_here, pepper, defaults, cost, file if auth is None else None)


def configured_slos(file: Path | None) -> dict[str, SloObjective]:
    """Return the SLO of each model in a configuration file, by the model's name. If `file` is None, read the file of
    the local cluster that is up. An invalid file ends the command with exit code 2."""
    if file is None and (run := local_run()) is not None and run.config_file.exists():
        file = run.config_file
    if file is None:
        return {}
    models = read_config(file).models
    return {model.name: SloObjective(model.slo.ttft_s, model.slo.itl_s, model.slo.target) for model in models}


def _section(kind: type[Section], data: Mapping[str, Any], name: str, file: Path | None) -> Section | None:
    if data.get(name) is None:
        return None
    try:
        return kind.model_validate(data[name])
    except ValidationError as error:
        lines = [f"{file}: {'.'.join([name, *map(str, item['loc'])])}: {item['msg']}" for item in error.errors()]
        fail("\n".join(lines), USAGE)


@contextlib.contextmanager
def ledger_errors() -> Iterator[None]:
    """Turn a ledger error into a one-line error.

    The exit code is 3 if the database is unreachable, 2 for an invalid value, and 1 otherwise.
    """
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
def open_ledger(settings: Settings, *, keys: bool = False, check: bool = True) -> Iterator[Ledger]:
    """Open the ledger.

    `keys`: also read the peppers, which operations on keys need. `check`: require a schema that this release can use;
    an empty database is first created if `settings.made_here` is set.
    """
    from cluster.ledger import files
    from cluster.ledger.database import migrate
    from cluster.ledger.store import Ledger

    with ledger_errors():
        if settings.local:
            make_private_folder(cache_dir())
        if keys and settings.made_here and settings.pepper_file == local_pepper():
            files.make_secret(settings.pepper_file)
        peppers = files.read_secrets(settings.pepper_file, "auth.api_keys.pepper_file") if keys else ()
        ledger = Ledger(settings.database_url, peppers=peppers)
        try:
            if check:
                if settings.made_here and ledger.check().state is migrate.SchemaState.EMPTY:
                    ledger.upgrade()
                ledger.require_usable()
            yield ledger
        finally:
            ledger.close()


def split_pair(text: str, option: str) -> tuple[str, str]:
    """Split an option's value of the form name=value. A value of another form ends the command with exit code 2."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        fail(f"{option} {text}: expected name=value", USAGE)
    return name, value


def shown_time(at_s: float | None) -> str:
    """Format a Unix time as a UTC time with seconds. The result is empty if the time is None."""
    if at_s is None:
        return ""
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def show_table(rows: Sequence[Mapping[str, Any]], nothing: str) -> None:
    """Print rows as a table, or the text `nothing` if there are no rows. All rows have the same keys."""
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
