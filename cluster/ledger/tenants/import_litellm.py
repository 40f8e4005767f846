"""Import teams, keys, limits, budgets and aliases from LiteLLM. All keys stay valid.

Keys stay valid because LiteLLM stores each key's SHA-256, from which Headrace computes its own digest. `read` reads
LiteLLM's rows. Any LiteLLM schema with teams is accepted; missing columns count as empty. `plan` decides, without a
database, which tenant or key each row becomes. The plan's notes name everything that cannot be imported, and the
consequences. `apply` writes a plan and can be repeated.

Rules: A team becomes a tenant. A key without a team belongs to the tenant of the key's user; a key without a user
becomes a tenant. A key with its own models, limits, budget or aliases becomes a tenant too: keys in Headrace have no
limits, and the import must not extend a key's rights. A budget is money in LiteLLM and tokens in Headrace, so budgets
are imported only if a price is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
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
LiteLLMRows = Mapping[str, Sequence[Row]]


@dataclass(frozen=True, slots=True)
class PlannedTenant:
    """A tenant to create. `source` names the LiteLLM object that becomes the tenant."""

    policy: TenantPolicy
    source: str
    model_aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """A key to import. `expires_at` is in seconds since the epoch."""

    tenant: str
    sha256_hex: str
    name: str
    expires_at: float | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """The tenants and keys to import. Each note names a LiteLLM object and the part that cannot be imported."""

    tenants: tuple[PlannedTenant, ...]
    keys: tuple[PlannedKey, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """Numbers of tenants and keys that `apply` has written. `skipped` has a message for each skipped tenant or key."""

    tenants: int
    keys: int
    skipped: tuple[str, ...]


def read(database_url: str) -> LiteLLMRows:
    """Read LiteLLM's rows. The keys of the returned mapping are the keys of TABLES.

    The password is in the environment variable HEADRACE_LITELLM_PASSWORD, else in the URL. Raises StoreUnavailable.
    Raises ValueError if LiteLLM's tables are missing.
    """
    engine = make_engine(database_url, os.environ.get("HEADRACE_LITELLM_PASSWORD", ""))
    try:
        with reading(engine) as connection:
            present = set(inspect(connection).get_table_names())
            if not {TABLES["teams"], TABLES["keys"]} <= present:
                raise ValueError(f"this database has no {TABLES['teams']}: is it LiteLLM's, and its schema `public`?")
            metadata = MetaData()
            rows: dict[str, list[Row]] = {}
            for name, table in TABLES.items():
                if table in present:
                    reflected = Table(table, metadata, autoload_with=connection, resolve_fks=False)
                    rows[name] = [dict(row) for row in connection.execute(select(reflected)).mappings()]
            return rows
    finally:
        engine.dispose()


def plan(rows: LiteLLMRows, now_s: float, *, tokens_per_dollar: float | None = None) -> ImportPlan:
    """Decide which tenants and keys to create from LiteLLM's rows. `now_s` is in seconds since the epoch.
    `tokens_per_dollar`: rate that turns budgets in dollars into token budgets; None if such budgets are not
    imported."""
    return _Planner(rows, now_s, tokens_per_dollar).plan()


def apply(import_plan: ImportPlan, ledger: Ledger) -> Applied:
    """Write a plan into the ledger. Raises LedgerError.

    Tenants and keys of an earlier import stay unchanged. If a planned tenant's name is taken by a tenant of another
    source, the planned tenant and its keys are skipped.
    """
    skipped, tenants, keys = [], 0, 0
    foreign: set[str] = set()
    for tenant in import_plan.tenants:
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
                    f"{tenant.source}: another tenants/{name} exists; rename one of them. Its keys are skipped too"
                )
    for key in import_plan.keys:
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
        return ""  # the tenant is deleted, and its usage is still kept


class _TenantPlan:
    """The tenants to create, by name. `note`: called with the name of a LiteLLM row and a message about the row."""

    def __init__(self, tokens_per_dollar: float | None, note: Callable[[str, str], None]) -> None:
        self._tokens_per_dollar = tokens_per_dollar
        self._note = note
        self.planned: dict[str, PlannedTenant] = {}

    def add(self, where: str, wanted_name: Any, row: Row, aliases: Mapping[str, Any], source: str) -> str:
        """Plan a tenant with the limits and models of `row`. Returns the tenant's name, which is `wanted_name` or, if
        another tenant has that name, a variant of it."""
        name = self._free_name(str(wanted_name))
        limits = self._limits(where, row)
        models = _models(row)
        suspended = not models or any(value == 0 for value in limits.values())
        if suspended:
            self._note(where, "may use nothing in LiteLLM (no models, or a limit of 0): it is suspended")
        for column, what in _UNMAPPED.items():
            if _is_set(row.get(column)):
                self._note(where, f"{column} does not map: {what}")
        positive = {key: value for key, value in limits.items() if value}
        try:
            policy = TenantPolicy(
                name,
                models=models or ("*",),
                limits=TenantLimits(**positive),
                labels={SOURCE_LABEL: source},
                suspended=bool(row.get("blocked")) or suspended,
            )
        except PolicyError as error:
            self._note(where, f"{error}: its limits are not imported, and it is suspended until you set them")
            policy = TenantPolicy(name, suspended=True, labels={SOURCE_LABEL: source})
        alias_names = {str(key): str(value) for key, value in aliases.items()}
        self.planned[name] = PlannedTenant(policy, where, alias_names)
        return name

    def narrow(self, name: str, team: TenantPolicy) -> None:
        """Restrict a planned tenant to the models that the team may use. If no model is left, the tenant is
        suspended."""
        planned = self.planned[name]
        allowed = tuple(m for m in planned.policy.models if team.allows(m))
        if not allowed:
            self._note(planned.source, "none of its models is allowed to its team: the tenant is suspended")
        policy = TenantPolicy.from_json(
            {**planned.policy.as_json(), "models": list(allowed or team.models)}
            | {"suspended": planned.policy.suspended or not allowed}
        )
        self.planned[name] = PlannedTenant(policy, planned.source, planned.model_aliases)

    def _free_name(self, wanted_name: str) -> str:
        plain = re.sub(r"[^a-z0-9._-]+", "-", wanted_name.lower()).strip("-._")[:56] or "tenant"
        name, number = plain, 1
        while name in self.planned:
            number += 1
            name = f"{plain}-{number}"
        return name

    def _limits(self, where: str, row: Row) -> dict[str, int]:
        limits: dict[str, int] = {}
        for theirs, ours in _LIMITS.items():
            value = row.get(theirs)
            if value is None:
                continue
            if int(value) < 0:
                self._note(where, f"{theirs} is {value}, which has no meaning: not imported")
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
                self._note(
                    where, f"{row['spend']:g} dollars of its budget are spent: the usage counted here starts at zero"
                )


class _Planner:
    """Maker of an ImportPlan from LiteLLM's rows. It decides which tenants to create and which tenant gets each key."""

    def __init__(self, rows: LiteLLMRows, now_s: float, tokens_per_dollar: float | None) -> None:
        self._rows = rows
        self._now_s = now_s
        self._budgets = {row["budget_id"]: row for row in rows.get("budgets", ())}
        self._aliases = {row["id"]: row for row in rows.get("aliases", ())}
        self._users = {row["user_id"]: row for row in rows.get("users", ())}
        self._tenants = _TenantPlan(tokens_per_dollar, self._note)
        self._by_team: dict[str, str] = {}
        self._by_user: dict[str, str] = {}
        self._by_token: dict[str, str] = {}
        self._keys: list[PlannedKey] = []
        self._notes: list[str] = []

    def plan(self) -> ImportPlan:
        for team in sorted(self._rows.get("teams", ()), key=lambda row: str(row["team_id"])):
            self._plan_team(team)
        for key in sorted(self._rows.get("keys", ()), key=lambda row: str(row["token"])):
            self._plan_key(key)
        for old in self._rows.get("old_keys", ()):
            self._plan_old_key(old)
        self._note_unmapped()
        return ImportPlan(tuple(self._tenants.planned.values()), tuple(self._keys), tuple(self._notes))

    def _note(self, where: str, what: str) -> None:
        self._notes.append(f"{where}: {what}")

    def _plan_team(self, row: Row) -> None:
        where = f"team {row.get('team_alias') or row['team_id']}"
        aliases = _json(self._aliases.get(row.get("model_id"), {}).get("aliases"))
        name = self._tenants.add(where, row.get("team_alias") or row["team_id"], row, aliases, f"team:{row['team_id']}")
        self._by_team[str(row["team_id"])] = name
        if _json(row.get("members_with_roles")) or row.get("members"):
            self._note(
                where, "its members are not imported: keys belong to the tenant, people to your identity provider"
            )

    def _plan_key(self, row: Row) -> None:
        where = f"key {row.get('key_alias') or row.get('key_name') or str(row['token'])[:8]}"
        digest = _sha256(str(row["token"]))
        if digest is None:
            self._note(where, "its stored token is no SHA-256: it is not imported")
            return
        expires_at = _seconds(row.get("expires"))
        if expires_at is not None and expires_at <= self._now_s:
            self._note(where, "has expired: it is not imported")
            return
        if row.get("blocked"):
            self._note(where, "is blocked: it is imported as revoked, permanently")
        tenant = self._tenant_of_key(where, row)
        self._by_token[str(row["token"])] = tenant
        name = str(row.get("key_alias") or row.get("key_name") or "")[:255]
        printable = "".join(c for c in name if c.isprintable())
        self._keys.append(PlannedKey(tenant, digest, printable, expires_at, bool(row.get("blocked"))))

    def _tenant_of_key(self, where: str, row: Row) -> str:
        """Return the name of the tenant that gets a key. If no planned tenant fits, plans a new tenant."""
        team, user = row.get("team_id"), row.get("user_id")
        alias = row.get("key_alias") or str(row["token"])[:8]
        own = self._own_restrictions(row)
        parent = self._by_team.get(str(team)) if team else None
        if team and parent is None:
            self._note(where, f"its team {team} does not exist: it becomes a separate tenant")
        if parent is not None and not own:
            return parent
        if parent is not None:
            self._note(where, f"has its own {', '.join(own)}: it becomes a tenant beside {parent}, outside its limits")
            return self._restricted_tenant(where, f"{parent}-{alias}", parent, row)
        if user and not team and not own:
            return self._user_tenant(str(user))
        return self._tenants.add(
            where, f"key-{alias}", self._with_budget(row), _json(row.get("aliases")), f"key:{str(row['token'])[:16]}"
        )

    def _own_restrictions(self, row: Row) -> list[str]:
        """Return the columns, such as `models`, in which the row of a key restricts the key."""
        words = []
        if [m for m in _list(row.get("models")) if m not in ALL_MODELS]:
            words.append("models")
        merged = self._with_budget(row)
        words += [name for name in (*_LIMITS, "max_budget") if merged.get(name) is not None]
        return words + (["aliases"] if _json(row.get("aliases")) else [])

    def _restricted_tenant(self, where: str, wanted_name: str, parent: str, row: Row) -> str:
        """Plan a tenant of its own for a key that is more restricted than the key's team, and return the tenant's
        name.

        `row`: the key's row. `where`: the row's place, for messages. `wanted_name`: preferred name of the tenant.
        `parent`: the team's tenant. If the key has no list of models, the tenant gets the team's models. If the
        team's tenant is suspended, the new tenant is suspended too.
        """
        team = self._tenants.planned[parent]
        merged = dict(self._with_budget(row))
        if not [m for m in _list(merged.get("models")) if m not in ALL_MODELS]:
            merged["models"] = [*team.policy.models]
        merged["blocked"] = team.policy.suspended
        aliases = {**team.model_aliases, **_json(row.get("aliases"))}
        name = self._tenants.add(where, wanted_name, merged, aliases, f"key:{str(row['token'])[:16]}")
        if team.policy.models != ("*",):
            self._tenants.narrow(name, team.policy)
        return name

    def _user_tenant(self, user: str) -> str:
        if user not in self._by_user:
            row = self._users.get(user, {})
            alias = row.get("user_alias") or user
            self._by_user[user] = self._tenants.add(
                f"user {alias}", f"user-{alias}", self._with_budget(row), {}, f"user:{user}"
            )
        return self._by_user[user]

    def _with_budget(self, row: Row) -> Row:
        """Return the row with the limits of the row's budget added. A limit in the row itself has precedence."""
        budget = self._budgets.get(row.get("budget_id"), {})
        names = (*_LIMITS, "max_budget", "budget_duration", "soft_budget", "model_max_budget")
        return {**row, **{name: budget[name] for name in names if row.get(name) is None and name in budget}}

    def _plan_old_key(self, row: Row) -> None:
        """If the old key of a rotation is still valid, plan to import it. It then expires at the same time as in
        LiteLLM."""
        tenant, until = self._by_token.get(str(row["active_token_id"])), _seconds(row["revoke_at"])
        digest = _sha256(str(row["token"]))
        if tenant is not None and digest is not None and until is not None and until > self._now_s:
            self._keys.append(PlannedKey(tenant, digest, "rotated", until))

    def _note_unmapped(self) -> None:
        for row in self._rows.get("organizations", ()):
            budget = self._budgets.get(row.get("budget_id"), {})
            if any(budget.get(name) is not None for name in (*_LIMITS, "max_budget")):
                self._note(f"organization {row.get('organization_alias')}", "limits over several teams do not map")
        limited = [row for row in self._rows.get("memberships", ()) if row.get("budget_id")]
        if limited:
            self._note("team members", f"{len(limited)} have their own budget, which does not map")
        if self._rows.get("jwt_mappings"):
            self._note("JWT mappings", "do not map: configure auth.oidc with a tenant claim")


def _models(row: Row) -> tuple[str, ...]:
    """Return the models that a row allows: ("*",) for all models, () for none."""
    models = _list(row.get("models"))
    if NO_MODELS in models:
        return tuple(m for m in models if m != NO_MODELS)
    if not models or ALL_MODELS & set(models):
        return ("*",)
    return tuple(models)


def _list(value: Any) -> list[str]:
    parsed = json.loads(value) if isinstance(value, str) and value.startswith("[") else value
    return [str(item) for item in parsed] if isinstance(parsed, list | tuple) else []


def _json(value: Any) -> dict[str, Any]:
    """Parse a value as a JSON object.

    A list becomes an object with the list's indexes as keys. A text that is not JSON becomes an object with the key
    `text`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"text": value} if value else {}
    if isinstance(value, list):
        return {str(at): item for at, item in enumerate(value)}
    return dict(value) if isinstance(value, dict) else {}


def _is_set(value: Any) -> bool:
    return bool(_json(value)) if isinstance(value, dict | list | str) else bool(value)


def _sha256(token: str) -> str | None:
    if re.fullmatch(r"[0-9a-f]{64}", token):
        return token
    if token.startswith("sk-"):  # early LiteLLM releases stored the key itself
        return hashlib.sha256(token.encode()).hexdigest()
    return None


def _seconds(value: Any) -> float | None:
    """Convert a time from LiteLLM to seconds since the epoch. A time without a time zone is in UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        return None
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
