"""The sections of cluster.yaml about tenants: auth, store, cost, classes, tenant_defaults, tenants.

Each section is checked when the section is built, and an error names the field and the remedy. `check_together` checks
the rules between the sections. Files with secrets are read where the secrets are used, not in this module.
"""

from __future__ import annotations

import difflib
import math
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cluster.config.problems import Problem, raise_all
from cluster.config.section import Section, is_this_host, url_parts
from cluster.policy.tenants.policy import GuardRule, PolicyError, TenantLimits, TenantPolicy

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_CURRENCY = re.compile(r"[A-Z]{3}")
_DNS = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.?")
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
MAX_STALE_S = 30 * 86400
MAX_DAYS = 36_500
MAX_GPU_HOUR = 10_000.0
RESERVED_TENANTS = frozenset({"_idle", "other", "nobody"})


def _checked_tenant(value: str) -> str:
    """Return a tenant's name unchanged. Raises ValueError for an invalid or reserved name."""
    if value in RESERVED_TENANTS:
        raise ValueError(f"{value!r} is reserved by Headrace: choose another name")
    try:
        TenantPolicy(value)
    except PolicyError as error:
        raise ValueError(f"{value!r} {error.remedy}") from None
    return value


class ApiKeys(Section):
    """API keys, which are stored as hashes with a pepper.

    `pepper_file` may contain several peppers; new API keys use the first. The default is the file `key-pepper` in the
    cache folder. Local commands create this file.
    """

    pepper_file: Path | None = None
    """File of the peppers. None: `key-pepper` in the cache folder."""


class Oidc(Section):
    """An OpenID issuer whose tokens name a tenant. The name of a claim may be a path (`realm_access.tenant`)."""

    issuer: str
    """URL of the issuer, as in the `iss` of its tokens; `https`, or `http` on this host."""
    audience: Annotated[str, Field(min_length=1)]
    """Audience that tokens must have."""
    tenant_claim: Annotated[str, Field(min_length=1)]
    """Claim that names the tenant."""
    role_claim: str = ""
    """Claim that names the role; empty: each token has the role `caller`."""
    algorithms: tuple[str, ...] = _ALGORITHMS
    """Accepted signature algorithms; a subset of the default."""

    @field_validator("issuer")
    @classmethod
    def _over_tls(cls, value: str) -> str:
        parts = url_parts(value)
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise ValueError(f"{value!r} is no URL: write the issuer as in the `iss` of its tokens, https://…")
        if parts.scheme == "http" and not is_this_host(parts.hostname):
            raise ValueError(f"{value!r}: an issuer's keys must be fetched over https; http is for this host only")
        return value

    @field_validator("algorithms")
    @classmethod
    def _asymmetric(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = sorted(set(value) - set(_ALGORITHMS))
        if wrong or not value:
            raise ValueError(f"{', '.join(wrong) or 'none given'}: allowed are {', '.join(_ALGORITHMS)}")
        return value


class ClientCertificate(Section):
    """A client certificate, named by its subject alternative name (a URI or DNS name), with its tenant and role."""

    san: Annotated[str, Field(min_length=1)]
    """Subject alternative name: a URI or a DNS name, without wildcards."""
    tenant: str
    """Tenant of the caller."""
    role: Literal["caller", "viewer", "tenant_admin", "operator"] = "caller"
    """Role of the caller."""

    @field_validator("tenant")
    @classmethod
    def _tenant_name(cls, value: str) -> str:
        return _checked_tenant(value)

    @field_validator("san")
    @classmethod
    def _plain(cls, value: str) -> str:
        if "*" in value:
            raise ValueError(f"{value!r}: wildcards are not supported; list each certificate's alternative name")
        if "://" not in value and not _DNS.fullmatch(value.lower()):
            raise ValueError(f"{value!r} is neither a URI (spiffe://…) nor a DNS name")
        return value


class Auth(Section):
    """Authentication of callers. Without this section there is one tenant, and client ports must be on loopback.

    `cluster_secret_file` defaults to the file `cluster-secret` in the cache folder. `up` creates this file. The
    default suits only a cluster on one host.
    """

    cluster_secret_file: Path | None = None
    """File of the gateways' common secret. None: `cluster-secret` in the cache folder, for one host only."""
    api_keys: ApiKeys | None = None
    oidc: tuple[Oidc, ...] = ()
    client_certificates: tuple[ClientCertificate, ...] = ()
    """Needs `gateway.tls.client_ca_file`."""

    @model_validator(mode="after")
    def _each_once(self) -> Auth:
        if self.api_keys is None and not self.oidc and not self.client_certificates:
            raise ValueError("no caller could be authenticated: set api_keys, oidc or client_certificates")
        _refuse_duplicates("oidc", [issuer.issuer for issuer in self.oidc])
        _refuse_duplicates("client_certificates", [_normalized_san(cert.san) for cert in self.client_certificates])
        return self


class RetentionDays(Section):
    """Retention of stored data, in days."""

    usage: Annotated[int, Field(ge=1, le=MAX_DAYS)] = 400
    """Days for which usage records are kept."""
    audit: Annotated[int, Field(ge=1, le=MAX_DAYS)] = 400
    """Days for which audit events are kept."""
    prompts: Annotated[int, Field(ge=1, le=MAX_DAYS)] = 30
    """Days for which prompts of tenants with `log_prompts` are kept."""


class Store(Section):
    """The section for the databases. One database holds tenants, keys and usage; by default it is SQLite in the cache
    folder. Another holds the limits that gateways share."""

    database_url: str = ""
    """`postgresql+psycopg://user@host/database` or `sqlite:////folder/file`; empty: SQLite in the cache folder. The
    password is in `HEADRACE_DATABASE_PASSWORD`."""
    limits_url: str = ""
    """`redis://`, `rediss://` or `unix://` of a Valkey or Redis in which gateways share limits; empty: each gateway
    has its own."""
    stale_after_s: Annotated[float, Field(gt=0, le=MAX_STALE_S)] = 86400.0
    """Seconds without the database for which known keys are still accepted."""
    retention_days: RetentionDays = RetentionDays()

    @field_validator("database_url")
    @classmethod
    def _database(cls, value: str) -> str:
        if not value:
            return value
        parts = url_parts(value)
        if parts.scheme == "sqlite":
            if not parts.path.strip("/") or ":memory:" in parts.path:
                raise ValueError("an in-memory database loses everything: name a file, sqlite:////folder/ledger.db")
            return value
        if parts.scheme not in ("postgresql", "postgresql+psycopg"):
            raise ValueError(f"{parts.scheme or value!r} is not supported: use postgresql+psycopg://… or sqlite:////…")
        if parts.password:
            raise ValueError("contains a password: remove it and set HEADRACE_DATABASE_PASSWORD")
        given = urllib.parse.parse_qs(parts.query)
        if not (parts.hostname or given.get("host")) or not parts.path.strip("/"):
            raise ValueError("names no host or no database: postgresql+psycopg://user@host/database")
        _check_options(given)
        return value

    @field_validator("limits_url")
    @classmethod
    def _limits(cls, value: str) -> str:
        if not value:
            return value
        parts = url_parts(value)
        if parts.scheme not in ("redis", "rediss", "unix") or not value.startswith(f"{parts.scheme}://"):
            raise ValueError("must be redis://, rediss:// (TLS) or unix://, of a Valkey or Redis")
        if parts.scheme == "unix" and not parts.path.strip("/"):
            raise ValueError("names no socket: write unix:///run/valkey.sock")
        if parts.scheme != "unix" and parts.path.strip("/") and not parts.path.strip("/").isdecimal():
            raise ValueError("its path must be the number of a database, e.g. redis://host:6379/0")
        _check_connection(value)
        return value


class Cost(Section):
    """Cost of a GPU hour by accelerator type; GPU-seconds are measured."""

    model_config = ConfigDict(allow_inf_nan=True)  # refused below, with the range

    currency: str
    """Currency code of ISO 4217, three capital letters."""
    gpu_hour: Mapping[str, float]
    """Cost of a GPU hour by accelerator type, each 0 to 10000."""

    @field_validator("currency")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if not _CURRENCY.fullmatch(value):
            raise ValueError(f"{value!r} must be three capital letters, a currency code of ISO 4217")
        return value

    @field_validator("gpu_hour")
    @classmethod
    def _sane(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        for gpu, rate in value.items():
            if not math.isfinite(rate) or not 0 <= rate <= MAX_GPU_HOUR:
                raise ValueError(f"{gpu}: {rate} must lie between 0 and {MAX_GPU_HOUR:g} for one hour")
        return value


class BudgetWebhook(Section):
    """Webhook that is called once per day or month when a tenant has used a token budget up to a threshold.

    Thresholds are fractions of the budget. Each request is signed with the secret, so that a receiver can verify it."""

    url: str
    """URL that gets a POST; `https`, or `http` on this host."""
    secret_file: Path
    """File of the secret that signs each request."""
    thresholds: tuple[Annotated[float, Field(gt=0, le=10)], ...] = (0.8, 1.0)
    """Fractions of a budget, one to ten different ones."""

    @field_validator("url")
    @classmethod
    def _over_tls(cls, value: str) -> str:
        parts = url_parts(value)
        if not parts.hostname or parts.scheme not in ("https", "http"):
            raise ValueError(f"{value!r} is no URL of a web server: write https://…")
        if parts.username or parts.password:
            raise ValueError("contains a user name or password: take it out; every request is signed")
        if parts.scheme == "http" and not is_this_host(parts.hostname):
            raise ValueError(f"{value!r}: tenant names must be sent over https; http is for this host only")
        return value

    @field_validator("thresholds")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(set(value)) != len(value) or len(value) > 10:
            raise ValueError("must be one to ten different fractions of a budget, e.g. [0.8, 1.0]")
        return value


class PriorityClass(Section):
    """A priority class. Lower ranks are served first; under overload the highest rank is shed first."""

    name: str
    """Name of the class: 1 to 63 lower-case letters, digits, `.`, `_` or `-`."""
    rank: Annotated[int, Field(ge=0, le=1000)]
    """Order of the classes; 0 is served first. Each rank occurs once."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{value!r} must be lower-case letters, digits, '.', '_' or '-', 1 to 63 characters")
        return value


CLASSES = (
    PriorityClass(name="interactive", rank=0),
    PriorityClass(name="standard", rank=1),
    PriorityClass(name="batch", rank=2),
)


class LimitSettings(Section):
    """Limits of a tenant. A limit that is left out has the value in tenant_defaults; null is unlimited."""

    requests_per_minute: int | None = None
    """Requests in any 60 s: 1 to 10^15; none: unlimited."""
    tokens_per_minute: int | None = None
    """Prompt and output tokens in any 60 s: 1 to 10^15; none: unlimited."""
    concurrent_requests: int | None = None
    """Calls at the same time: 1 to 10^15; none: unlimited."""
    daily_tokens: int | None = None
    """Prompt and output tokens in a day of UTC: 1 to 10^15; none: unlimited."""
    monthly_tokens: int | None = None
    """Prompt and output tokens in a month of UTC: 1 to 10^15; none: unlimited."""

    @field_validator("*")
    @classmethod
    def _possible(cls, value: int | None, info: ValidationInfo) -> int | None:
        try:
            TenantLimits(**{str(info.field_name): value})
        except PolicyError as error:
            raise ValueError(error.remedy) from None
        return value


class TenantRetention(Section):
    """Days for which one tenant's data is kept. A value may be smaller or larger than the cluster's setting. With 0,
    the data is not stored."""

    usage_days: Annotated[int, Field(ge=0, le=MAX_DAYS)] | None = None
    """Days for usage records. None: `store.retention_days.usage`."""
    audit_days: Annotated[int, Field(ge=0, le=MAX_DAYS)] | None = None
    """Days for audit events. None: `store.retention_days.audit`."""
    prompts_days: Annotated[int, Field(ge=0, le=MAX_DAYS)] | None = None
    """Days for logged prompts. None: `store.retention_days.prompts`."""


class Guard(Section):
    """A check of input or output; exactly one of `builtin` (patterns or sizes) and `address` (a guard server)."""

    builtin: str = ""
    """`patterns` or `sizes`."""
    address: str = ""
    """Address of a guard server, `unix:/path` or `host:port`. Input only."""
    ca_file: str = ""
    """CA of the guard server's certificate; empty: public authorities."""
    on: Literal["input", "output"] = "input"
    """Text that is checked."""
    action: Literal["refuse", "redact", "flag"] = "refuse"
    """Action on a match: refuse the text, replace the match (`patterns` only), or count and audit it."""
    patterns_file: str = ""
    """YAML file of expressions by name, re-read when it changes. Instead of `patterns`."""
    patterns: Mapping[str, str] = Field(default_factory=dict)
    """Expressions of RE2 by name."""
    max_characters: int | None = None
    """Most characters of all texts of a prompt, or of an output: 1 or more; none: no bound. `sizes` only."""
    max_messages: int | None = None
    """Most messages of a prompt: 1 or more; none: no bound. `sizes` on input only."""
    fail: Literal["closed", "open"] = "closed"
    """Result if the guard cannot decide: `closed` refuses, `open` lets the text pass."""
    timeout_s: float = 1.0
    """Seconds for each prompt and for each step of an output: above 0, at most 60."""

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        return restore_on_key(value)

    @model_validator(mode="after")
    def _possible(self) -> Guard:
        self.rule()
        return self

    def rule(self) -> GuardRule:
        """Return the guard as a GuardRule, the type that tenant policies use. Raises PolicyError."""
        return GuardRule(**self.model_dump())


class _TenantFields(Section):
    """Fields that Tenant and TenantDefaults have in common."""

    model_config = ConfigDict(allow_inf_nan=True)  # refused by the policy, with the range

    class_: Annotated[str, Field(alias="class")] = "standard"
    """Name of a priority class of `classes`."""
    weight: float = 1.0
    """Share relative to other tenants of the class: 0.001 to 1000000."""
    models: tuple[str, ...] = ("default",)
    """Names, aliases or globs of the models that the tenant may use."""
    limits: LimitSettings = LimitSettings()
    max_context_tokens: int | None = None
    """Longest prompt and output in tokens: 1 or more. None: the model's."""
    max_output_tokens: int | None = None
    """Longest output in tokens: 1 or more. None: the model's."""
    on_budget: Literal["finish", "stop"] = "finish"
    """Effect of a spent budget on running calls: they end (`stop`) or continue (`finish`)."""
    guards: tuple[Guard, ...] = ()
    """Guards run in this order."""
    retention: TenantRetention = TenantRetention()

    @field_validator("weight", "models", "max_context_tokens", "max_output_tokens")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            TenantPolicy("x", **{str(info.field_name): value})
        except PolicyError as error:
            raise ValueError(error.remedy) from None
        return value


class TenantDefaults(_TenantFields):
    """Default fields of tenants. A tenant created over the API gets a copy at its creation."""

    def policy(self, name: str, own: Mapping[str, Any] | None = None) -> TenantPolicy:
        """Return a tenant's complete policy: these defaults, overridden by the tenant's own fields.

        `own`: the tenant's fields, by the names that the configuration uses (such as `class`). `limits` are overridden
        key by key. Raises PolicyError.
        """
        if name in RESERVED_TENANTS:
            raise PolicyError("name", f"{name!r} is reserved by Headrace: choose another")
        fields: dict[str, Any] = {"name": name, **_as_plain(self)}
        for key, value in (own or {}).items():
            mapped = isinstance(fields.get(key), dict) and isinstance(value, Mapping)
            fields[key] = {**fields[key], **value} if mapped else value
        return TenantPolicy.from_json(fields)


class Tenant(_TenantFields):
    """A tenant declared in this file; the API cannot change it."""

    name: str
    """Name of the tenant: 1 to 63 lower-case letters, digits, `.`, `_` or `-`, the first a letter or digit."""
    cache_group: str = ""
    """Tenants of the same group share the prefix cache; empty: the tenant shares it with no other."""
    log_prompts: bool = False
    """Whether prompts and outputs are written to the prompt log."""
    labels: Mapping[str, str] = Field(default_factory=dict)
    """Labels of each usage record, at most 32."""
    suspended: bool = False
    """Whether the tenant's calls are refused."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked_tenant(value)

    @model_validator(mode="after")
    def _whole(self) -> Tenant:
        self.policy(TenantDefaults())
        return self

    def policy(self, defaults: TenantDefaults) -> TenantPolicy:
        """Return this tenant's complete policy. Raises PolicyError."""
        own = _as_plain(self, only_set=True)
        own.pop("name")
        return defaults.policy(self.name, own)


def restore_on_key(value: Any) -> Any:
    """Restore the key `on` of guards, which YAML 1.1 reads as true."""
    if isinstance(value, Mapping):
        return {"on" if key is True else key: restore_on_key(item) for key, item in value.items()}
    return [restore_on_key(item) for item in value] if isinstance(value, list) else value


def _as_plain(section: Section, *, only_set: bool = False) -> dict[str, Any]:
    return section.model_dump(by_alias=True, exclude_unset=only_set, mode="json")


def check_together(
    auth: Auth | None,
    classes: Sequence[PriorityClass],
    defaults: TenantDefaults,
    tenants: Sequence[Tenant],
) -> None:
    """Raise ProblemsError if the sections contradict each other."""
    raise_all(problems_together(auth, classes, defaults, tenants))


def problems_together(
    auth: Auth | None,
    classes: Sequence[PriorityClass],
    defaults: TenantDefaults,
    tenants: Sequence[Tenant],
) -> Iterator[Problem]:
    """Yield a problem for each contradiction between the sections."""
    yield from _duplicates("classes", [priority_class.name for priority_class in classes])
    yield from _duplicates("classes", [f"rank {priority_class.rank}" for priority_class in classes])
    names = {priority_class.name for priority_class in classes}
    yield from _unknown_class(("tenant_defaults",), defaults.class_, names)
    yield from _duplicates("tenants", [tenant.name for tenant in tenants])
    for at, tenant in enumerate(tenants):
        try:
            policy = tenant.policy(defaults)
        except PolicyError as error:
            yield Problem(("tenants", at, *filter(None, error.field.split("."))), error.remedy)
            continue
        yield from _unknown_class(("tenants", at), policy.priority_class, names)
    if defaults.guards and auth is None:
        yield Problem(
            ("tenant_defaults", "guards"), "without auth there are no tenants to guard: set auth, or remove them"
        )
    if tenants and auth is None:
        yield Problem(("tenants",), "without auth callers have no tenants: set auth, or remove the section")


def _unknown_class(where: tuple[str | int, ...], name: str, known: set[str]) -> Iterator[Problem]:
    if name not in known:
        yield Problem((*where, "class"), f"{name!r} is none of classes ({', '.join(sorted(known))})")


def _duplicates(where: str, names: Sequence[str]) -> Iterator[Problem]:
    for at, name in enumerate(names):
        if name in names[:at]:
            yield Problem((where, at), f"{name!r} is listed twice; remove one")


def _refuse_duplicates(where: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: {name!r} is listed twice; remove one")


_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")


def _check_options(given: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError for options of a PostgreSQL URL that the driver would refuse when connecting."""
    from psycopg.pq import Conninfo

    known = sorted(option.keyword.decode() for option in Conninfo.get_defaults())
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"PostgreSQL has no connection option {name!r}{f'; did you mean {near[0]}?' if near else ''}"
            )
    if wrong := [mode for mode in given.get("sslmode", ()) if mode not in _SSL_MODES]:
        raise ValueError(f"sslmode={wrong[0]} is unknown: use one of {', '.join(_SSL_MODES)}")


def _check_connection(url: str) -> None:
    """Raise ValueError for options of a Valkey URL that the client would refuse. Opens no connection."""
    from redis.asyncio import ConnectionPool
    from redis.exceptions import RedisError

    try:
        pool = ConnectionPool.from_url(url)
        pool.connection_class(**pool.connection_kwargs)
    except (ValueError, TypeError, RedisError) as error:
        options = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        unknown = [name for name in options if f"'{name}'" in str(error)]
        why = f"unknown option {unknown[0]}" if isinstance(error, TypeError) and unknown else error
        raise ValueError(f"cannot be used: {why}") from None


def _normalized_san(san: str) -> str:
    return san if "://" in san else san.lower().rstrip(".")
