"""Bringing LiteLLM's teams, keys, limits, budgets and aliases over, so that no tenant changes a key.

LiteLLM keeps the SHA-256 of each key, which is what our digests are made from. `read` takes the rows (any schema since
its first teams: columns that are missing count as empty), `plan` decides without a database what each becomes, and
says of everything that has no place here what it was and what that means; `apply` writes, and can be repeated.

Rules. A team is a tenant. A key without a team belongs to its user's tenant, or is one of its own. A key that is
narrower than its team (models, limits, budget, aliases) becomes a tenant of its own, because keys have no limits here
and must not gain by the move. Budgets are money there and tokens here: they come over only at a given price.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import MetaData, Table, inspect, select

from cluster.ledger.database.connect import make_engine, reading
from cluster.ledger.errors import AlreadyExists, NotFound
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import PolicyError, TenantLimits, TenantPolicy

TABLES = {
    "teams": "LiteLLM_TeamTable",
    "keys": "LiteLLM_VerificationToken",
    "old_keys": "LiteLLM_DeprecatedVerificationToken",
    "budgets": "LiteLLM_BudgetTable",
    "aliases": "LiteLLM_ModelTable",
    "users": "LiteLLM_UserTable",
    "organizations": "LiteLLM_OrganizationTable",
    "memberships": "LiteLLM_TeamMembership",
    "jwt_mappings": "LiteLLM_JWTKeyMapping",
}
SOURCE_LABEL = "litellm"
ALL_MODELS = {"all-proxy-models", "all-team-models"}
NO_MODELS = "no-default-models"
_DAY = re.compile(r"^(1d|24h|1440m|86400s)$")
_MONTH = re.compile(r"^(1mo|28d|29d|30d|31d|monthly)$")
_LIMITS = {
    "rpm_limit": "requests_per_minute",
    "tpm_limit": "tokens_per_minute",
    "tpd_limit": "daily_tokens",
    "max_parallel_requests": "concurrent_requests",
}
_UNMAPPED = {
    "soft_budget": "soft budgets: set a budget threshold in the configuration",
    "model_max_budget": "budgets by model",
    "budget_limits": "budgets by model or window",
    "router_settings": "router settings",
    "policies": "policies: guards are set by tenant",
    "access_group_ids": "access groups: name the models themselves",
    "object_permission_id": "object permissions (MCP servers, vector stores)",
    "allowed_routes": "allowed routes",
    "config": "a key's own configuration",
}
Row = Mapping[str, Any]
Found = Mapping[str, Sequence[Row]]


@dataclass(frozen=True, slots=True)
class PlannedTenant:
    """A tenant to make, and from what."""

    policy: TenantPolicy
    source: str
    model_aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """A key to take over. `expires_at` is seconds since the epoch."""

    tenant: str
    sha256_hex: str
    name: str
    expires_at: float | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import would do. `notes` say what does not map, each with where it was."""

    tenants: tuple[PlannedTenant, ...]
    keys: tuple[PlannedKey, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What an import did; what was there already is counted as skipped."""

    tenants: int
    keys: int
    skipped: tuple[str, ...]


def read(database_url: str, password: str | None = None) -> Found:
    """LiteLLM's rows by our name of each table. Raises StoreUnavailable, and ValueError when it is no such database."""
    engine = make_engine(database_url, password)
    try:
        with reading(engine) as connection:
            here = set(inspect(connection).get_table_names())
            if not {TABLES["teams"], TABLES["keys"]} <= here:
                raise ValueError(f"this database has no {TABLES['teams']}: is it LiteLLM's, and its schema `public`?")
            metadata = MetaData()
            found: dict[str, list[Row]] = {}
            for name, table in TABLES.items():
                if table in here:
                    reflected = Table(table, metadata, autoload_with=connection, resolve_fks=False)
                    found[name] = [dict(row) for row in connection.execute(select(reflected)).mappings()]
            return found
    finally:
        engine.dispose()


def plan(found: Found, now_s: float, *, tokens_per_dollar: float | None = None) -> ImportPlan:
    """Decide what each row becomes."""
    return _Planner(found, now_s, tokens_per_dollar).plan()


def apply(made: ImportPlan, ledger: Ledger) -> Applied:
    """Write a plan; what an import has made before stays as it is, and nothing is given to a tenant that only happens
    to have the name. Raises LedgerError."""
    skipped, tenants, keys = [], 0, 0
    foreign: set[str] = set()
    for tenant in made.tenants:
        name, source = tenant.policy.name, tenant.policy.labels[SOURCE_LABEL]
        try:
            ledger.tenants.create(tenant.policy, model_aliases=tenant.model_aliases)
            tenants += 1
        except AlreadyExists as error:
            if _source_of(ledger, name) == source:
                skipped.append(str(error))
            else:
                foreign.add(name)
                skipped.append(
                    f"{tenant.source}: another tenants/{name} is here; rename one of them. Its keys wait too"
                )
    for key in made.keys:
        if key.tenant in foreign:
            continue
        try:
            ledger.keys.import_hash(
                key.tenant, key.sha256_hex, name=key.name, expires_at=key.expires_at, revoked=key.revoked
            )
            keys += 1
        except AlreadyExists as error:
            skipped.append(f"tenants/{key.tenant}, key {key.name!r}: {error}")
    return Applied(tenants, keys, tuple(skipped))


def _source_of(ledger: Ledger, name: str) -> str:
    try:
        return ledger.tenants.get(name).policy.labels.get(SOURCE_LABEL, "")
    except NotFound:
        return ""  # deleted, with usage still here


class _Planner:
    def __init__(self, found: Found, now_s: float, tokens_per_dollar: float | None) -> None:
        self._found = found
        self._now_s = now_s
        self._tokens_per_dollar = tokens_per_dollar
        self._budgets = {row["budget_id"]: row for row in found.get("budgets", ())}
        self._aliases = {row["id"]: row for row in found.get("aliases", ())}
        self._users = {row["user_id"]: row for row in found.get("users", ())}
        self._tenants: dict[str, PlannedTenant] = {}
        self._by_team: dict[str, str] = {}
        self._by_user: dict[str, str] = {}
        self._by_token: dict[str, str] = {}
        self._keys: list[PlannedKey] = []
        self._notes: list[str] = []

    def plan(self) -> ImportPlan:
        for team in sorted(self._found.get("teams", ()), key=lambda row: str(row["team_id"])):
            self._team(team)
        for key in sorted(self._found.get("keys", ()), key=lambda row: str(row["token"])):
            self._key(key)
        for old in self._found.get("old_keys", ()):
            self._old_key(old)
        self._rest()
        return ImportPlan(tuple(self._tenants.values()), tuple(self._keys), tuple(self._notes))

    def _note(self, where: str, what: str) -> None:
        self._notes.append(f"{where}: {what}")

    def _team(self, row: Row) -> None:
        where = f"team {row.get('team_alias') or row['team_id']}"
        aliases = _json(self._aliases.get(row.get("model_id"), {}).get("aliases"))
        name = self._tenant(where, row.get("team_alias") or row["team_id"], row, aliases, f"team:{row['team_id']}")
        self._by_team[str(row["team_id"])] = name
        if _json(row.get("members_with_roles")) or row.get("members"):
            self._note(
                where, "its members do not come over: keys belong to the tenant, people to your identity provider"
            )

    def _key(self, row: Row) -> None:
        where = f"key {row.get('key_alias') or row.get('key_name') or str(row['token'])[:8]}"
        digest = _sha256(str(row["token"]))
        if digest is None:
            self._note(where, "its stored token is no SHA-256: it does not come over")
            return
        expires_at = _seconds(row.get("expires"))
        if expires_at is not None and expires_at <= self._now_s:
            self._note(where, "has expired: it does not come over")
            return
        if row.get("blocked"):
            self._note(where, "is blocked: it comes over revoked, for good")
        tenant = self._owner(where, row)
        self._by_token[str(row["token"])] = tenant
        name = str(row.get("key_alias") or row.get("key_name") or "")[:255]
        printable = "".join(c for c in name if c.isprintable())
        self._keys.append(PlannedKey(tenant, digest, printable, expires_at, bool(row.get("blocked"))))

    def _owner(self, where: str, row: Row) -> str:
        """The tenant of a key, made if need be."""
        team, user = row.get("team_id"), row.get("user_id")
        alias = row.get("key_alias") or str(row["token"])[:8]
        own = self._narrower(row)
        parent = self._by_team.get(str(team)) if team else None
        if team and parent is None:
            self._note(where, f"its team {team} does not exist: it becomes a tenant of its own")
        if parent is not None and not own:
            return parent
        if parent is not None:
            self._note(
                where, f"has {', '.join(own)} of its own: it becomes a tenant beside {parent}, outside its limits"
            )
            return self._narrowed(where, f"{parent}-{alias}", parent, row)
        if user and not team and not own:
            return self._user(str(user))
        return self._tenant(
            where, f"key-{alias}", self._with_budget(row), _json(row.get("aliases")), f"key:{str(row['token'])[:16]}"
        )

    def _narrower(self, row: Row) -> list[str]:
        """What a key restricts beyond its owner."""
        words = []
        if [m for m in _list(row.get("models")) if m not in ALL_MODELS]:
            words.append("models")
        whole = self._with_budget(row)
        words += [name for name in (*_LIMITS, "max_budget") if whole.get(name) is not None]
        return words + (["aliases"] if _json(row.get("aliases")) else [])

    def _narrowed(self, where: str, wish: str, parent: str, row: Row) -> str:
        """A tenant for a key within a team: the team's models, class and standing unless its own are narrower."""
        team = self._tenants[parent]
        whole = dict(self._with_budget(row))
        if not [m for m in _list(whole.get("models")) if m not in ALL_MODELS]:
            whole["models"] = [*team.policy.models]
        whole["blocked"] = team.policy.suspended
        aliases = {**team.model_aliases, **_json(row.get("aliases"))}
        name = self._tenant(where, wish, whole, aliases, f"key:{str(row['token'])[:16]}")
        made = self._tenants[name]
        if team.policy.models != ("*",):
            both = tuple(m for m in made.policy.models if team.policy.allows(m))
            if not both:
                self._note(where, "its models are none of its team's: the tenant is suspended")
            policy = TenantPolicy.from_json(
                {**made.policy.as_json(), "models": list(both or team.policy.models)}
                | {"suspended": made.policy.suspended or not both}
            )
            self._tenants[name] = PlannedTenant(policy, made.source, made.model_aliases)
        return name

    def _user(self, user: str) -> str:
        if user not in self._by_user:
            row = self._users.get(user, {})
            alias = row.get("user_alias") or user
            self._by_user[user] = self._tenant(
                f"user {alias}", f"user-{alias}", self._with_budget(row), {}, f"user:{user}"
            )
        return self._by_user[user]

    def _with_budget(self, row: Row) -> Row:
        """The row with the fields of the budget it names, where it has none itself."""
        budget = self._budgets.get(row.get("budget_id"), {})
        names = (*_LIMITS, "max_budget", "budget_duration", "soft_budget", "model_max_budget")
        return {**row, **{name: budget[name] for name in names if row.get(name) is None and name in budget}}

    def _old_key(self, row: Row) -> None:
        """A key that was rotated and still works for a while."""
        tenant, until = self._by_token.get(str(row["active_token_id"])), _seconds(row["revoke_at"])
        digest = _sha256(str(row["token"]))
        if tenant is not None and digest is not None and until is not None and until > self._now_s:
            self._keys.append(PlannedKey(tenant, digest, "rotated", until))

    def _tenant(self, where: str, wish: Any, row: Row, aliases: Mapping[str, Any], source: str) -> str:
        name = self._free_name(str(wish))
        limits = self._limits(where, row)
        models = self._models(where, row)
        stopped = not models or any(value == 0 for value in limits.values())
        if stopped:
            self._note(where, "may use nothing there (no models, or a limit of 0): it is suspended here")
        for column, what in _UNMAPPED.items():
            if _says_something(row.get(column)):
                self._note(where, f"{column} does not map: {what}")
        good = {key: value for key, value in limits.items() if value}
        try:
            policy = TenantPolicy(
                name,
                models=models or ("*",),
                limits=TenantLimits(**good),
                labels={SOURCE_LABEL: source},
                suspended=bool(row.get("blocked")) or stopped,
            )
        except PolicyError as error:
            self._note(where, f"{error}: its limits do not come over, and it is suspended until you set them")
            policy = TenantPolicy(name, suspended=True, labels={SOURCE_LABEL: source})
        known = {str(key): str(value) for key, value in aliases.items()}
        self._tenants[name] = PlannedTenant(policy, where, known)
        return name

    def _free_name(self, wish: str) -> str:
        plain = re.sub(r"[^a-z0-9._-]+", "-", wish.lower()).strip("-._")[:56] or "tenant"
        name, number = plain, 1
        while name in self._tenants:
            number += 1
            name = f"{plain}-{number}"
        return name

    def _models(self, where: str, row: Row) -> tuple[str, ...]:
        models = _list(row.get("models"))
        if NO_MODELS in models:
            return tuple(m for m in models if m != NO_MODELS)
        if not models or ALL_MODELS & set(models):
            return ("*",)
        return tuple(models)

    def _limits(self, where: str, row: Row) -> dict[str, int]:
        limits: dict[str, int] = {}
        for theirs, ours in _LIMITS.items():
            value = row.get(theirs)
            if value is None:
                continue
            if int(value) < 0:
                self._note(where, f"{theirs} is {value}, which means nothing: left out")
            else:
                limits[ours] = int(value)
        self._budget(where, row, limits)
        return limits

    def _budget(self, where: str, row: Row, limits: dict[str, int]) -> None:
        money, duration = row.get("max_budget"), str(row.get("budget_duration") or "")
        if money is None:
            return
        name = "daily_tokens" if _DAY.match(duration) else "monthly_tokens" if _MONTH.match(duration) else ""
        if self._tokens_per_dollar is None:
            self._note(where, f"max_budget of {money:g} dollars: budgets are tokens here; give --tokens-per-dollar")
        elif not name:
            period = duration or "without a period"
            self._note(where, f"max_budget of {money:g} dollars, {period}: only days and months map")
        else:
            limits[name] = min(int(money * self._tokens_per_dollar), limits.get(name, 10**15))
            if row.get("spend"):
                self._note(where, f"{row['spend']:g} dollars are spent of its budget: it starts anew")

    def _rest(self) -> None:
        for row in self._found.get("organizations", ()):
            budget = self._budgets.get(row.get("budget_id"), {})
            if any(budget.get(name) is not None for name in (*_LIMITS, "max_budget")):
                self._note(f"organization {row.get('organization_alias')}", "limits over several teams do not map")
        limited = [row for row in self._found.get("memberships", ()) if row.get("budget_id")]
        if limited:
            self._note("team members", f"{len(limited)} have a budget of their own, which does not map")
        if self._found.get("jwt_mappings"):
            self._note("JWT mappings", "do not map: configure auth.oidc with a tenant claim")


def _list(value: Any) -> list[str]:
    parsed = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    return [str(item) for item in parsed] if isinstance(parsed, list | tuple) else []


def _json(value: Any) -> dict[str, Any]:
    """A JSON object that is not empty; lists count by their places."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"text": value} if value else {}
    if isinstance(value, list):
        return {str(at): item for at, item in enumerate(value)}
    return dict(value) if isinstance(value, dict) else {}


def _says_something(value: Any) -> bool:
    return bool(_json(value)) if isinstance(value, dict | list | str) else bool(value)


def _sha256(token: str) -> str | None:
    if re.fullmatch(r"[0-9a-f]{64}", token):
        return token
    if token.startswith("sk-"):  # releases before hashing kept the key itself
        return hashlib.sha256(token.encode()).hexdigest()
    return None


def _seconds(value: Any) -> float | None:
    """LiteLLM's times are UTC without saying so."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
