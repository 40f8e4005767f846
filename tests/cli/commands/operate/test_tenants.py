"""The commands tenants, keys, usage, audit, db and import work on a database."""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli.all_commands import app
from cluster.cli.local.run_folder import ProcessId, RunFolder
from cluster.ledger.files import read_secrets
from cluster.ledger.store import Ledger
from cluster.policy.tenants.identity import authenticate
from cluster.policy.tenants.policy import TenantPolicy
from tests.ledger.samples import record
from tests.ledger.tenants import litellm_schema
from tests.support import postgres

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of a SQLite database that does not exist yet."""
    return f"sqlite:///{tmp_path / 'ledger.db'}"


@pytest.fixture
def run() -> Run:
    """Function that runs a command in this process."""

    def invoke(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=input)

    return invoke


def good(result: Result) -> Any:
    """Return the JSON value that a successful command printed."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_from_nothing_to_a_key_that_works(run: Run, cache: Path) -> None:
    """Commands without options create a local ledger and a local key pepper, and the new API key is accepted."""
    made = good(run("tenants", "create", "acme", "--weight", "4", "--set", "limits.tokens_per_minute=5000", "--json"))
    assert (made["weight"], made["limits"]["tokens_per_minute"], made["origin"]) == (4.0, 5000, "api")
    result = run("keys", "create", "acme", "--name", "ci")
    key = result.stdout.strip()
    assert key.startswith("hr_k")
    assert "not shown again" in result.stderr
    ledger = Ledger(f"sqlite:///{cache / 'ledger.db'}")
    peppers = read_secrets(cache / "key-pepper", "pepper")
    assert authenticate(ledger.snapshots.read(), key, peppers, 0).reason == "ok"
    ledger.close()
    assert key not in run("keys", "list", "acme").stdout
    assert "active" in run("keys", "list", "acme").stdout


def test_a_user_without_a_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system does not know, as in a pod with another `runAsUser`, can create tenants and keys. The
    audit log has the user's number."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    good(run("tenants", "create", "acme", "--json"))
    assert run("keys", "create", "acme").stdout.startswith("hr_k")
    assert {event["actor"] for event in good(run("audit", "--json"))} == {f"cli:uid {os.getuid()}"}


def test_the_first_operator_is_made_on_the_file_of_a_configuration(run: Run, tmp_path: Path) -> None:
    """The first operator can be created before any process has started, as documented in docs/admin.md.

    The commands create the SQLite database that the configuration names.
    """
    file = tmp_path / "cluster.yaml"
    file.write_text(f"auth: {{api_keys: {{}}}}\nstore: {{database_url: 'sqlite:///{tmp_path / 'l.db'}'}}\n")
    good(run("tenants", "create", "ops", "-f", str(file), "--json"))
    assert run("keys", "create", "ops", "--role", "operator", "-f", str(file)).stdout.startswith("hr_k")
    assert "ops" in run("tenants", "list", "--database-url", f"sqlite:///{tmp_path / 'l.db'}").stdout


def test_the_database_of_the_local_cluster_is_taken(run: Run, cache: Path, tmp_path: Path) -> None:
    """Commands without options use the database of the local cluster that is up."""
    folder = RunFolder("here")
    folder.path.mkdir(parents=True)
    own = ProcessId.of(os.getpid())
    folder.write({"supervisor": {"pid": own.pid, "created": own.created}, "endpoints": {}})
    folder.config_file.write_text(f"store: {{database_url: 'sqlite:///{tmp_path / 'l.db'}'}}\n")
    good(run("tenants", "create", "acme", "--json"))
    assert run("keys", "create", "acme").stdout.startswith("hr_k")
    assert "acme" in run("tenants", "list", "--database-url", f"sqlite:///{tmp_path / 'l.db'}").stdout
    assert not (cache / "ledger.db").exists()


def test_a_tenants_life(run: Run) -> None:
    """A tenant can be created, changed, suspended, resumed, deleted and erased.

    The audit log has an event with the reason for each step, and after the erasure no event names the tenant.
    """
    good(run("tenants", "create", "acme", "--class", "batch", "--label", "team=a", "--model", "tiny", "--json"))
    changed = good(run("tenants", "update", "acme", "--set", "labels.team=null", "--set", "on_budget=stop", "--json"))
    assert (changed["labels"], changed["on_budget"], changed["class"]) == ({}, "stop", "batch")
    assert "suspended acme" in run("tenants", "suspend", "acme", "--reason", "unpaid").stdout
    assert good(run("tenants", "get", "acme", "--json"))["suspended"] is True
    assert "suspended" in run("tenants", "list").stdout
    assert "resumed acme" in run("tenants", "resume", "acme").stdout
    assert run("tenants", "delete", "acme", "--reason", "left").exit_code == 0
    assert run("tenants", "get", "acme").exit_code == 1
    events = good(run("audit", "--json"))
    assert [event["action"] for event in reversed(events)] == [
        "tenants.create",
        "tenants.update",
        "tenants.suspend",
        "tenants.resume",
        "tenants.delete",
    ]
    assert {event["reason"] for event in events} == {"", "unpaid", "left"}
    assert "unpaid" in run("audit", "--tenant", "acme").stdout
    assert run("tenants", "delete", "acme", "--erase", "--reason", "acme asked").exit_code == 2
    assert "erased acme" in run("tenants", "delete", "acme", "--erase", "--yes", "--reason", "acme asked").stdout
    (event,) = good(run("audit", "--json"))
    assert "acme" not in json.dumps(event)
    assert event["reason"] == "… asked"


def test_keys_are_rotated_and_revoked(run: Run) -> None:
    """A key made by a rotation names the key that it replaces, and a revoked key is listed as revoked.

    Unknown keys, roles and tenants are refused.
    """
    run("tenants", "create", "acme")
    first = good(run("keys", "create", "acme", "--expires-days", "2", "--json"))
    second = good(run("keys", "rotate", "acme", first["id"], "--overlap-s", "3600", "--json"))
    assert second["rotated_from"] == first["id"]
    assert run("keys", "revoke", "acme", first["id"], "--reason", "lost").exit_code == 0
    rows = {row["id"]: row for row in good(run("keys", "list", "acme", "--json"))}
    assert bool(rows[first["id"]]["revoked_at"]) is True
    assert rows[second["id"]]["revoked_at"] == ""
    assert run("keys", "revoke", "acme", "nope", "--reason", "lost").exit_code == 1
    assert run("keys", "create", "acme", "--role", "root").exit_code == 2
    assert run("keys", "create", "nobody").exit_code == 1


def test_usage_in_all_its_forms(run: Run, url: str, tmp_path: Path) -> None:
    """`usage` prints sums as a table, CSV or JSON, and prints single records.

    Costs are computed with prices from the configuration file or from options.
    """
    ledger = Ledger(url)
    ledger.upgrade()
    ledger.usage.insert([record("a", gpu_seconds=3600.0), record("b", model="big", labels={"team": "b"})])
    ledger.close()
    at = ("--database-url", url)
    assert "acme" in run("usage", *at).stdout
    rows = good(run("usage", *at, "--group-by", "label:team", "--json"))
    assert [(row["label:team"], row["requests"]) for row in rows] == [("a", 1), ("b", 1)]
    assert run("usage", *at, "--csv").stdout.splitlines()[0].startswith("tenant,model,requests")
    (priced,) = good(run("usage", *at, "--group-by", "tenant", "--model", "tiny", "--gpu-hour", "H100=2.4", "--json"))
    assert (priced["cost"], priced["currency"]) == (2.4, "EUR")
    file = tmp_path / "cluster.yaml"
    file.write_text(f"store: {{database_url: '{url}'}}\ncost: {{currency: USD, gpu_hour: {{H100: 1}}}}\n")
    (priced,) = good(run("usage", "-f", str(file), "--cost", "--group-by", "tenant", "--model", "tiny", "--json"))
    assert (priced["cost"], priced["currency"]) == (1.0, "USD")
    assert len(good(run("usage", *at, "--records", "--json"))) == 2
    assert "no usage" in run("usage", *at, "--since", "2100-01-01").stdout
    assert run("usage", *at, "--cost").exit_code == 2
    assert run("usage", *at, "--gpu-hour", "H100=-1").exit_code == 2
    assert run("usage", *at, "--group-by", "shoe").exit_code == 2


def test_what_is_declared_in_a_file_is_read_only(run: Run, url: str) -> None:
    """A tenant that is declared in a file cannot be changed, and the error names the reason."""
    ledger = Ledger(url)
    ledger.upgrade()
    ledger.tenants.declare([TenantPolicy("acme")])
    ledger.close()
    done = run("tenants", "suspend", "acme", "--reason", "unpaid", "--database-url", url)
    assert done.exit_code == 1
    assert "declared in a file" in done.stderr


def test_the_database_is_checked_upgraded_and_moved(run: Run, url: str, tmp_path: Path) -> None:
    """A database can be checked with `db check` and upgraded with `db upgrade`.

    A backup can be restored into another, empty database.
    """
    at = ("--database-url", url)
    done = run("tenants", "list", *at)
    assert (done.exit_code, "db upgrade" in done.stderr) == (3, True)
    assert run("db", "check", *at).exit_code == 1
    assert "applied r0001" in run("db", "upgrade", *at).stdout
    assert good(run("db", "check", *at, "--json"))["state"] == "current"
    assert run("tenants", "create", "acme", *at).exit_code == 0
    backup = tmp_path / "b.gz"
    assert "1 tenants" in run("db", "backup", str(backup), *at).stdout
    other = ("--database-url", f"sqlite:///{tmp_path / 'other.db'}")
    assert "restored 1 tenants" in run("db", "restore", str(backup), *other).stdout
    assert "acme" in run("tenants", "list", *other).stdout
    assert run("db", "restore", str(backup), *other).exit_code == 2
    assert run("db", "restore", str(tmp_path / "none"), *other).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tenants", "create", "Acme"), 2, "name"),
        (("tenants", "create", "a", "--set", "limits.tokens_per_minute=0"), 2, "limits.tokens_per_minute"),
        (("tenants", "create", "a", "--set", "limits.tokens_per_minute=-5"), 2, "limits.tokens_per_minute"),
        (("tenants", "create", "a", "--weight", "0"), 2, "weight"),
        (("tenants", "create", "a", "--set", "wieght=1"), 2, "wieght"),
        (("tenants", "create", "a", "--set", "nonsense"), 2, "name=value"),
        (("tenants", "update", "a"), 2, "nothing to change"),
        (("tenants", "suspend", "a"), 2, "--reason"),
        (("tenants", "delete", "a", "--reason", " "), 2, "reason"),
        (("tenants", "list", "-f", "x", "--admin", "h:1"), 2, "give one of them"),
        (("tenants", "list", "--admin", "127.0.0.1:1"), 3, "no gateway answers"),
        (("tenants", "get", "a"), 1, "tenants/a does not exist"),
        (("tenants", "list", "--database-url", "mysql://h/d"), 2, "not served"),
        (("tenants", "list", "--database-url", "postgresql://u@127.0.0.1:1/d"), 3, "does not answer"),
        (("tenants", "list", "-f", "/no/such/file"), 2, "cannot be read"),
        (("keys", "create", "a", "--pepper-file", "/no/such/file"), 2, "pepper_file"),
    ],
)
def test_bad_input(run: Run, arguments: tuple[str, ...], code: int, words: str) -> None:
    """Each invalid command line has the expected exit code and an error that names the invalid value."""
    done = run(*arguments)
    assert (done.exit_code, words in done.stderr) == (code, True), done.output


def test_a_wrong_section_is_named(run: Run, tmp_path: Path) -> None:
    """An invalid section of the configuration is reported with the path of the invalid key."""
    file = tmp_path / "cluster.yaml"
    file.write_text("store: {stale_after_s: -1}\n")
    done = run("tenants", "list", "-f", str(file))
    assert done.exit_code == 2
    assert "store.stale_after_s" in done.stderr


def test_litellm_comes_over(run: Run, url: str) -> None:
    """An import from LiteLLM creates tenants and keys.

    A dry run prints what cannot be imported and writes nothing.
    """
    with postgres.running() as server:
        theirs = server.new_database()
        with server.connect(theirs.rsplit("/", 1)[1]) as connection:
            litellm_schema.make(connection)
            connection.execute(
                'INSERT INTO "LiteLLM_TeamTable" ("team_id", "team_alias", "max_budget", "budget_duration") '
                "VALUES ('t', 'Acme', 5, '30d')"
            )
            connection.execute(
                'INSERT INTO "LiteLLM_VerificationToken" ("token", "team_id") VALUES (%s, \'t\')', ["ab" * 32]
            )
        run("db", "upgrade", "--database-url", url)
        arguments = ("import", "litellm", "--database-url", theirs, "--ledger-url", url)
        dry = run(*arguments, "--dry-run")
        assert "would make 1 tenants and 1 keys" in dry.stdout
        assert "does not map: team Acme: max_budget of 5 dollars" in dry.stdout
        assert "no tenants" in run("tenants", "list", "--database-url", url).stdout
        pepper = Path(url[10:]).parent / "pepper"
        pepper.write_text("p" * 40)
        done = good(run(*arguments, "--tokens-per-dollar", "1000", "--pepper-file", str(pepper), "--json"))
        assert (done["made_tenants"], done["made_keys"], done["does_not_map"]) == (1, 1, [])
    made = good(run("tenants", "get", "acme", "--database-url", url, "--json"))
    assert made["limits"]["monthly_tokens"] == 5000
