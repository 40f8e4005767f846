"""After an import from LiteLLM every key is still valid, and no key has gained rights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.ledger.store import Ledger
from cluster.ledger.tenants import import_litellm
from cluster.ledger.tenants.import_litellm import ImportPlan, PlannedTenant, apply, plan, read
from cluster.policy.tenants.identity import authenticate
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from tests.ledger.conftest import PEPPER
from tests.ledger.tenants import litellm_schema
from tests.support.postgres import PASSWORD, PostgresServer

NOW = 1_795_000_000.0  # 2026-11-18


def sha(key: str) -> str:
    """Return the hash that LiteLLM stores for a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def team(team_id: str, **more: Any) -> dict[str, Any]:
    """Return a row of LiteLLM's table of teams."""
    return {"team_id": team_id, "team_alias": None, "models": [], **more}


def key(secret: str, **more: Any) -> dict[str, Any]:
    """Return a row of LiteLLM's table of keys."""
    return {"token": sha(secret), "key_alias": secret, "models": [], "team_id": None, "user_id": None, **more}


def tenant(import_plan: ImportPlan, name: str) -> PlannedTenant:
    """Return the planned tenant with the given name."""
    (match,) = [planned for planned in import_plan.tenants if planned.policy.name == name]
    return match


def owner(import_plan: ImportPlan, secret: str) -> str:
    """Return the name of the tenant to which the import plan assigns the key `secret`."""
    (match,) = [planned for planned in import_plan.keys if planned.sha256_hex == sha(secret)]
    return match.tenant


def test_limits_models_and_aliases() -> None:
    """A tenant gets the limits, models, aliases and suspension of the LiteLLM team."""
    rows = {
        "teams": [
            team(
                "t1",
                team_alias="Acme Corp.",
                rpm_limit=60,
                tpm_limit=1000,
                tpd_limit=5000,
                max_parallel_requests=4,
                models=["gpt-4o", "openai/*"],
                model_id=3,
            ),
            team("t2", team_alias="acme corp", models=["all-proxy-models"], blocked=True),
        ],
        "aliases": [{"id": 3, "aliases": {"fast": "gpt-4o"}}],
        "keys": [],
    }
    import_plan = plan(rows, NOW)
    acme = tenant(import_plan, "acme-corp")
    assert acme.policy.limits == TenantLimits(60, 1000, 4, daily_tokens=5000)
    assert (acme.policy.models, acme.model_aliases) == (("gpt-4o", "openai/*"), {"fast": "gpt-4o"})
    other = tenant(import_plan, "acme-corp-2").policy
    assert (other.models, other.suspended) == (("*",), True)
    assert import_plan.notes == ()


@pytest.mark.parametrize(
    ("duration", "limits", "note"),
    [
        ("1d", {"daily_tokens": 20_000}, ""),
        ("24h", {"daily_tokens": 20_000}, ""),
        ("30d", {"monthly_tokens": 20_000}, ""),
        ("1mo", {"monthly_tokens": 20_000}, ""),
        ("7d", {}, "only days and months"),
        (None, {}, "without a period"),
    ],
)
def test_budgets_come_over_at_a_price(duration: str | None, limits: dict[str, int], note: str) -> None:
    """A budget in dollars per day or month becomes tokens per day or month.

    A budget with another period, and any budget without a price, becomes a note.
    """
    rows = {"teams": [team("t", max_budget=2.0, budget_duration=duration, spend=0.5)], "keys": []}
    import_plan = plan(rows, NOW, tokens_per_dollar=10_000)
    assert tenant(import_plan, "t").policy.limits == TenantLimits(**limits)
    assert note in "".join(import_plan.notes)
    assert ("starts at zero" in "".join(import_plan.notes)) == bool(limits)
    (without,) = plan(rows, NOW).notes
    assert "--tokens-per-dollar" in without


def test_a_key_that_is_narrower_gains_nothing() -> None:
    """A LiteLLM key with its own models, limits, budget or aliases becomes a separate tenant. This tenant may use no
    model that the key's team may not use."""
    rows = {
        "teams": [team("t", team_alias="acme", models=["a", "b"]), team("s", team_alias="stopped", blocked=True)],
        "keys": [
            key("plain", team_id="t"),
            key("same", team_id="t", models=["all-team-models"]),
            key("models", team_id="t", models=["a"]),
            key("beyond", team_id="t", models=["c"]),
            key("slow", team_id="t", rpm_limit=3),
            key("budget", team_id="t", budget_id="b1"),
            key("alias", team_id="t", aliases={"x": "a"}),
            key("halted", team_id="s", rpm_limit=3),
        ],
        "budgets": [{"budget_id": "b1", "tpm_limit": 77, "max_budget": None}],
    }
    import_plan = plan(rows, NOW)
    assert [owner(import_plan, name) for name in ("plain", "same")] == ["acme", "acme"]
    assert tenant(import_plan, "acme-models").policy.models == ("a",)
    assert tenant(import_plan, "acme-beyond").policy.suspended
    assert tenant(import_plan, "acme-slow").policy.limits.requests_per_minute == 3
    assert tenant(import_plan, "acme-slow").policy.models == ("a", "b")
    assert tenant(import_plan, "acme-budget").policy.limits.tokens_per_minute == 77
    assert tenant(import_plan, "acme-alias").model_aliases == {"x": "a"}
    assert tenant(import_plan, "stopped-halted").policy.suspended
    assert sum("a tenant beside acme" in note for note in import_plan.notes) == 5


def test_keys_without_a_team() -> None:
    """A key without a team belongs to the tenant of the key's user, or becomes a tenant if the key has no user."""
    rows = {
        "teams": [],
        "users": [{"user_id": "u1", "user_alias": "Ada", "rpm_limit": 9, "models": []}],
        "keys": [
            key("k1", user_id="u1"),
            key("k2", user_id="u1"),
            key("k3", user_id="nobody"),
            key("k4"),
            key("k5", team_id="lost"),
        ],
    }
    import_plan = plan(rows, NOW)
    assert [owner(import_plan, f"k{n}") for n in (1, 2, 3, 4, 5)] == ["user-ada"] * 2 + [
        "user-nobody",
        "key-k4",
        "key-k5",
    ]
    assert tenant(import_plan, "user-ada").policy.limits.requests_per_minute == 9
    assert any("team lost does not exist" in note for note in import_plan.notes)


def test_what_does_not_map_is_told() -> None:
    """The plan of an import has a note for each zero or negative limit, missing model, unusable key and unsupported
    feature."""
    rows = {
        "teams": [
            team("zero", rpm_limit=0),
            team("minus", tpm_limit=-5),
            team("huge", tpm_limit=10**18),
            team("none", models=["no-default-models"]),
            team("rich", soft_budget=1.0, model_max_budget={"a": 1}, policies=["p"], router_settings={"x": 1}),
            team("people", members_with_roles=[{"user_id": "u", "role": "admin"}]),
        ],
        "keys": [
            key("old", expires="2020-01-01T00:00:00"),
            {**key("odd"), "token": "what?"},
            key("blocked", team_id="rich", blocked=True),
        ],
        "organizations": [{"organization_alias": "org", "budget_id": "b"}],
        "budgets": [{"budget_id": "b", "max_budget": 5.0}],
        "memberships": [{"user_id": "u", "team_id": "t", "budget_id": "b"}],
        "jwt_mappings": [{"id": 1}],
    }
    import_plan = plan(rows, NOW)
    text = "\n".join(import_plan.notes)
    for words in (
        "team zero: may use nothing",
        "team minus: tpm_limit is -5",
        "team huge: tokens_per_minute",
        "team none: may use nothing",
        "team rich: soft_budget",
        "team rich: model_max_budget",
        "team rich: policies",
        "team rich: router_settings",
        "team people: its members",
        "key old: has expired",
        "key odd: its stored token",
        "key blocked: is blocked",
        "organization org",
        "team members: 1",
        "auth.oidc",
    ):
        assert words in text, words
    assert all(tenant(import_plan, name).policy.suspended for name in ("zero", "huge", "none"))
    assert [planned.revoked for planned in import_plan.keys] == [True]


def test_over_a_real_database(server: PostgresServer, tmp_path: Path) -> None:
    """All imported keys work after an import from PostgreSQL, and a second import changes nothing.

    A tenant with the same name that is not from LiteLLM gets no keys.
    """
    url = server.new_database()
    with server.connect(url.rsplit("/", 1)[1]) as connection:
        litellm_schema.make(connection)
        connection.execute('INSERT INTO "LiteLLM_ModelTable" ("id", "aliases") VALUES (1, %s)', ['{"fast": "tiny"}'])
        connection.execute(
            'INSERT INTO "LiteLLM_TeamTable" ("team_id", "team_alias", "models", "tpm_limit", "model_id", '
            '"members_with_roles") VALUES (%s, %s, %s, %s, 1, %s), (%s, %s, %s, NULL, NULL, DEFAULT)',
            ["t1", "Acme", ["tiny"], 5000, json.dumps([{"role": "user"}]), "t2", "taken", []],
        )
        connection.execute(
            'INSERT INTO "LiteLLM_VerificationToken" ("token", "key_alias", "team_id", "expires") VALUES '
            "(%s, 'ci', 't1', '2030-01-01'), (%s, 'other', 't2', NULL)",
            [sha("sk-live"), sha("sk-taken")],
        )
        connection.execute(
            'INSERT INTO "LiteLLM_DeprecatedVerificationToken" ("id", "token", "active_token_id", "revoke_at") '
            "VALUES ('1', %s, %s, '2027-01-01')",
            [sha("sk-rotated"), sha("sk-live")],
        )
    import_plan = plan(read(url), NOW)
    assert [note.split(":")[0] for note in import_plan.notes] == ["team Acme"]
    ledger = Ledger(f"sqlite:///{tmp_path / 'l.db'}", peppers=(PEPPER,), clock=lambda: NOW)
    ledger.upgrade()
    ledger.tenants.create(TenantPolicy("taken"))
    applied = apply(import_plan, ledger)
    assert (applied.tenants, applied.keys) == (1, 2)
    assert "another tenants/taken" in applied.skipped[0]
    snapshot = ledger.snapshots.read()

    def verdict(secret: str, now_s: float = NOW) -> tuple[str, str]:
        result = authenticate(snapshot, secret, (PEPPER,), now_s)
        return result.reason, result.principal.tenant.name if result.principal else ""

    assert verdict("sk-live") == ("ok", "acme")
    assert verdict("sk-live", 1_893_456_000.0) == ("expired", "")
    assert verdict("sk-rotated") == ("ok", "acme")
    assert verdict("sk-rotated", 1_798_761_600.0) == ("expired", "")
    assert verdict("sk-taken") == ("unknown", "")
    assert snapshot.tenants["acme"].model_aliases == {"fast": "tiny"}
    second = apply(import_plan, ledger)
    assert (second.tenants, second.keys, len(second.skipped)) == (0, 0, 4)
    ledger.close()


def test_the_ledgers_password_is_not_sent_to_litellm(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password of LiteLLM's database is that of the URL or of HEADRACE_LITELLM_PASSWORD, also where the ledger's
    password is set."""
    url = server.new_database()
    name = url.rsplit("/", 1)[1]
    with server.connect(name) as connection:
        litellm_schema.make(connection)
    monkeypatch.setenv("HEADRACE_DATABASE_PASSWORD", "of the ledger")
    assert read(url)["teams"] == []
    monkeypatch.setenv("HEADRACE_LITELLM_PASSWORD", PASSWORD)
    assert read(server.url(name, password=""))["teams"] == []


def test_another_database_is_refused(tmp_path: Path) -> None:
    """The error for a database without LiteLLM's tables names a missing table."""
    with pytest.raises(ValueError, match="LiteLLM_TeamTable"):
        read(f"sqlite:///{tmp_path / 'x.db'}")


def test_the_tables_are_those_of_the_real_schema() -> None:
    """The schema in litellm_schema.py has every table that an import reads, except the table of JWT mappings."""
    assert all(
        f'"{name}"' in litellm_schema.SCHEMA for at, name in import_litellm.TABLES.items() if at != "jwt_mappings"
    )
