"""What the commands about tenants share: the ledger they open, how it refuses, and how rows are shown.

Its database is that of --database-url, else of the file's store.database_url, else that of the local cluster that is
up, else the local one in the cache folder.
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

from cluster.cli.common import FAILED, UNREACHABLE_CODE, USAGE, fail, local_run, out
from cluster.config.schema import cache_dir
from cluster.config.tenants import Auth, Cost, Store, TenantDefaults
from cluster.config.yaml_reader import NotYaml, load
from cluster.ledger.rows import Prices
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
    Path | None, typer.Option("--pepper-file", help="The file of auth.api_keys.pepper_file.", dir_okay=False)
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.")]
RequiredReasonOption = Annotated[str, typer.Option("--reason", help="Why, for the audit log.", show_default=False)]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a command needs of the configuration. `made_here`: the database is the local one or a configuration's SQLite
    file, which the first command that needs it makes, as `headrace up` would."""

    database_url: str
    local: bool
    made_here: bool
    pepper_file: Path
    defaults: TenantDefaults
    cost: Cost | None

    @property
    def rates(self) -> Prices | None:
        """Of the file's cost section."""
        return Prices(self.cost.currency, dict(self.cost.gpu_hour)) if self.cost else None


def local_pepper() -> Path:
    """The local cluster's pepper; the only one that is made where it is missing."""
    return cache_dir() / "key-pepper"


def settings(file: Path | None, database_url: str | None, pepper_file: Path | None = None) -> Settings:
    """From options and the file's sections, without both from the file of the local cluster that is up. Ends the
    command with exit code 2 when they are wrong."""
    data: Any = {}
    if file is None and database_url is None and (run := local_run()) is not None and run.config_file.exists():
        file = run.config_file
    if file is not None:
        try:
            data = load(file.read_text())
        except (OSError, UnicodeDecodeError, NotYaml) as error:
            fail(f"{file}: cannot be read: {error}", USAGE)
        if not isinstance(data, dict):
            fail(f"{file}: is no mapping", USAGE)
    store, auth = _section(Store, data, "store", file), _section(Auth, data, "auth", file)
    url = database_url or (store.database_url if store else "")
    pepper = pepper_file or (auth.api_keys.pepper_file if auth and auth.api_keys else None) or local_pepper()
    defaults = _section(TenantDefaults, data, "tenant_defaults", file) or TenantDefaults()
    local = f"sqlite:///{cache_dir() / 'ledger.db'}"
    made_here = not url or (not database_url and url.startswith("sqlite"))
    return Settings(url or local, not url, made_here, pepper, defaults, _section(Cost, data, "cost", file))


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
    """The ledger, made at its first use where it is `made_here`; others say what to run."""
    from cluster.ledger import files
    from cluster.ledger.database import migrate
    from cluster.ledger.store import Ledger

    with told():
        if chosen.local:
            make_private_folder(cache_dir())
        if keys and chosen.made_here and chosen.pepper_file == local_pepper():
            files.make_secret(chosen.pepper_file)
        peppers = files.read_secrets(chosen.pepper_file, "auth.api_keys.pepper_file") if keys else ()
        ledger = Ledger(chosen.database_url, peppers=peppers)
        try:
            if check:
                if chosen.made_here and ledger.check().state is migrate.State.EMPTY:
                    ledger.upgrade()
                ledger.require_usable()
            yield ledger
        finally:
            ledger.close()


def pair(text: str, option: str) -> tuple[str, str]:
    """The two sides of an option's name=value. Ends the command with exit code 2 for another form."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        fail(f"{option} {text}: write name=value", USAGE)
    return name, value


def shown_time(at_s: float | None) -> str:
    """UTC, to the second."""
    if at_s is None:
        return ""
    return datetime.datetime.fromtimestamp(at_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def show_table(rows: Sequence[Mapping[str, Any]], nothing: str) -> None:
    """Rows of one shape, or the word for none."""
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
