"""Tenant policy as set by an operator. A policy is frozen, validated when it is built, and convertible to JSON.

Invariant: every existing policy is valid. A limit is None (no limit) or at least 1; zero and negative numbers are
errors and never mean "no limit". To stop a tenant, an operator suspends the tenant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, TypeVar

T = TypeVar("T")

MAX_LIMIT = 10**15
"""Maximum value of a limit. A higher value is assumed to be a typo: at a million tokens per second, this many tokens
take thirty years."""
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e6
MAX_LABELS = 32
MAX_RETENTION_DAYS = 36_500
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")


class PolicyError(ValueError):
    """Raised for an invalid field. `field` is the path of the field in the policy, for example
    `limits.tokens_per_minute`."""

    def __init__(self, field_path: str, remedy: str) -> None:
        super().__init__(f"{field_path}: {remedy}")
        self.field = field_path
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """Limits of a tenant. None means no limit. Minutes are sliding windows; days and months are in UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    daily_tokens: int | None = None
    monthly_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in (limit.name for limit in dataclasses.fields(self)):
            value = getattr(self, name)
            if value is None:
                continue
            if not _is_int(value):
                raise PolicyError(name, f"must be a whole number, not {value!r}")
            if value < 1:
                raise PolicyError(name, "must be 1 or more; leave it out for no limit, suspend a tenant to stop it")
            if value > MAX_LIMIT:
                raise PolicyError(name, f"must not exceed {MAX_LIMIT}; leave it out for no limit")


@dataclass(frozen=True, slots=True)
class GuardRule:
    """Rule of one guard. Guards run in the order of the policy.

    Exactly one of `builtin` and `address` is set. `builtin`: `patterns` or `sizes`. `address`: address of a server of
    cluster.guard.v1, as `unix:/path` or host:port. A server on another host is called over TLS. `ca_file`: certificate
    of the private authority that has issued the server's certificate; "" for a public authority. `timeout_s` bounds
    each call of the guard. `fail`: whether text is refused (`closed`) or passes (`open`) when the guard gives no
    verdict. `patterns`: regular expressions by name; `patterns_file`: a file with such patterns.
    """

    builtin: str = ""
    address: str = ""
    ca_file: str = ""
    on: Literal["input", "output"] = "input"
    action: Literal["refuse", "redact", "flag"] = "refuse"
    patterns_file: str = ""
    patterns: Mapping[str, str] = field(default_factory=dict)
    max_characters: int | None = None
    max_messages: int | None = None
    fail: Literal["closed", "open"] = "closed"
    timeout_s: float = 1.0

    def __post_init__(self) -> None:
        if bool(self.builtin) == bool(self.address):
            raise PolicyError("builtin", "exactly one of builtin and address must be given")
        if self.builtin not in ("", "patterns", "sizes"):
            raise PolicyError("builtin", f"must be patterns or sizes, not {self.builtin!r}")
        _one_of(self, "on", ("input", "output"))
        _one_of(self, "action", ("refuse", "redact", "flag"))
        _one_of(self, "fail", ("closed", "open"))
        if self.builtin == "patterns":
            self._check_patterns()
        elif self.patterns or self.patterns_file:
            raise PolicyError("patterns", "belongs to the patterns guard alone; take it out")
        if self.builtin == "sizes":
            self._check_sizes()
        elif self.max_characters is not None or self.max_messages is not None:
            raise PolicyError("max_characters", "belongs to the sizes guard alone, as max_messages does; take it out")
        if self.address:
            self._check_address()
        elif self.ca_file:
            raise PolicyError("ca_file", "belongs to address; take it out")
        if not 0 < self.timeout_s <= 60:
            raise PolicyError("timeout_s", "must be above 0 and at most 60")

    def _check_patterns(self) -> None:
        if bool(self.patterns) == bool(self.patterns_file):
            raise PolicyError("patterns", "the patterns guard needs either patterns or patterns_file")
        if not self.patterns:
            return
        from cluster.policy.tenants.patterns import PatternError, patterns_of  # imports re2, which few tenants need

        try:
            patterns_of(tuple(self.patterns.items()))
        except PatternError as error:
            raise PolicyError(f"patterns.{error.name}".rstrip("."), error.remedy) from None

    def _check_sizes(self) -> None:
        for name in ("max_characters", "max_messages"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or not 1 <= value <= MAX_LIMIT):
                raise PolicyError(name, "must be 1 or more; leave it out for no bound")
        if self.on == "output" and self.max_messages is not None:
            raise PolicyError("max_messages", "an output is no message list; set it on input")
        if self.max_characters is None and self.max_messages is None:
            raise PolicyError("max_characters", "the sizes guard needs max_characters or, on input, max_messages")
        if self.action == "redact":
            raise PolicyError("action", "the sizes guard can refuse or flag, not redact")

    def _check_address(self) -> None:
        if self.on == "output":
            raise PolicyError("on", "a guard server sees input only; use builtin: patterns or sizes on output")
        if self.action != "refuse":
            raise PolicyError("action", "a guard server says itself what is to be done; take action out")
        host, _, port = self.address.rpartition(":")
        if not self.address.startswith("unix:/") and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise PolicyError("address", f"must be host:port or unix:/path, not {self.address!r}")


@dataclass(frozen=True, slots=True)
class Retention:
    """Number of days for which the records of a tenant are kept. None: the default of the cluster. 0: nothing is
    kept."""

    usage_days: int | None = None
    audit_days: int | None = None
    prompts_days: int | None = None

    def __post_init__(self) -> None:
        for name in (period.name for period in dataclasses.fields(self)):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or not 0 <= value <= MAX_RETENTION_DAYS):
                raise PolicyError(name, f"must be a whole number of days from 0 to {MAX_RETENTION_DAYS}")


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """Policy of one tenant, as the gateway, the ledger and other components use it.

    `handle`: keyed hash of the name, which workers get in place of the name; "" until the gateway has derived it.
    `models`: names, aliases, adapters (`model:adapter`) or globs of these. If `max_context_tokens` or
    `max_output_tokens` is None, the limit of the model applies. `cache_group`: tenants of one group share a prefix
    cache; with "", the tenant shares none. `on_budget`: whether running calls finish or stop when the budget is used
    up.
    """

    name: str
    handle: str = ""
    priority_class: str = "standard"
    weight: float = 1.0
    models: tuple[str, ...] = ("*",)
    limits: TenantLimits = field(default_factory=TenantLimits)
    max_context_tokens: int | None = None
    max_output_tokens: int | None = None
    on_budget: Literal["finish", "stop"] = "finish"
    cache_group: str = ""
    guards: tuple[GuardRule, ...] = ()
    log_prompts: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    retention: Retention = field(default_factory=Retention)
    suspended: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= 63 or not set(self.name) <= NAME_CHARACTERS or not self.name[0].isalnum():
            raise PolicyError("name", "must be 1 to 63 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit")
        if not self.priority_class:
            raise PolicyError("class", "must name one of the configuration's classes")
        if not _is_number(self.weight) or not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise PolicyError("weight", f"must lie between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}")
        for name in ("max_context_tokens", "max_output_tokens"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or not 1 <= value <= MAX_LIMIT):
                raise PolicyError(name, "must be 1 or more; leave it out for the model's own")
        if not self.models or not all(self.models):
            raise PolicyError("models", "must name at least one model, alias or glob; '*' for all")
        _one_of(self, "on_budget", ("finish", "stop"))
        if len(self.labels) > MAX_LABELS:
            raise PolicyError("labels", f"must be at most {MAX_LABELS}")
        if not all(isinstance(x, str) for pair in self.labels.items() for x in pair):
            raise PolicyError("labels", "must be strings")

    @property
    def flow(self) -> str:
        """Name of the tenant in fair queues: the handle, or the tenant's name while there is no handle."""
        return self.handle or self.name

    def allows(self, model: str) -> bool:
        """Return whether the tenant may use a model of this name. The comparison is case-sensitive."""
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def as_json(self) -> dict[str, Any]:
        """Return the policy as plain values; `from_json` is the inverse. The keys are the field names of the
        configuration, such as `class` for `priority_class`."""
        out = _plain(dataclasses.asdict(self))
        out["class"] = out.pop("priority_class")
        return typing.cast(dict[str, Any], out)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build a policy from plain values.

        Raises PolicyError with the path of an unknown, mistyped or invalid field.
        """
        return _build(cls, value)

    @classmethod
    def from_stored(cls, value: Mapping[str, Any]) -> Self:
        """Build a policy from plain values that a ledger has stored.

        Unknown fields are ignored: gateways of a later release, which share the ledger during an upgrade and after a
        rollback, may have written them. Raises PolicyError with the path of a mistyped or invalid field.
        """
        return _build(cls, value, ignore_unknown=True)

    @classmethod
    def suspended_in_place_of(cls, name: str, value: object) -> Self:
        """Return a suspended policy for a tenant whose stored policy `value` cannot be used. Raises PolicyError for an
        invalid name.

        The stored retention still applies. If it cannot be read either, usage and audit records are kept as long as a
        policy allows, so that nothing is deleted too early.
        """
        try:
            stored = value.get("retention", {}) if isinstance(value, Mapping) else None
            retention = _build(Retention, stored, ignore_unknown=True)
        except PolicyError:
            retention = Retention(usage_days=MAX_RETENTION_DAYS, audit_days=MAX_RETENTION_DAYS)
        return cls(name, retention=retention, suspended=True)


_RENAMED = {"class": "priority_class"}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(owner: object, name: str, words: tuple[str, ...]) -> None:
    if getattr(owner, name) not in words:
        raise PolicyError(name, f"must be one of {', '.join(words)}, not {getattr(owner, name)!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Type hints of a class. The hints are cached, because a snapshot holds thousands of policies."""
    return typing.get_type_hints(kind)


def _build(kind: type[T], value: object, *, ignore_unknown: bool = False) -> T:
    if not isinstance(value, Mapping):
        raise PolicyError("", f"must be an object, not {value!r}")
    hints = _hints(kind)  # type: ignore[arg-type]  # classes are hashable
    given: dict[str, Any] = {}
    for key, item in value.items():
        name = _RENAMED.get(key, key) if kind is TenantPolicy else key
        if name not in hints or (key == "priority_class" and kind is TenantPolicy):
            if ignore_unknown:
                continue
            raise PolicyError(str(key), f"is unknown; there are {', '.join(sorted(hints))}")
        given[name] = _parse(hints[name], item, str(key), ignore_unknown)
    if kind is TenantPolicy and "name" not in given:
        raise PolicyError("name", "must be given")
    return kind(**given)


def _parse(hint: Any, value: object, path: str, ignore_unknown: bool) -> Any:
    """Convert `value` to the type `hint`: a dataclass, a tuple, a mapping of strings, or a plain value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    try:
        if dataclasses.is_dataclass(hint):
            return _build(typing.cast(type, hint), value, ignore_unknown=ignore_unknown)
        if origin is tuple:
            if not isinstance(value, list | tuple):
                raise PolicyError("", "must be a list")
            return tuple(_parse(arguments[0], item, f"[{at}]", ignore_unknown) for at, item in enumerate(value))
        if isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise PolicyError("", "must be an object")
            return dict(value)
    except PolicyError as error:
        raise PolicyError(f"{path}.{error.field}".rstrip(".").replace(".[", "["), error.remedy) from None
    if not _fits(hint, value):
        raise PolicyError(path, f"must be {_name(hint)}, not {value!r}")
    return value


def _fits(hint: Any, value: object) -> bool:
    if hint is int:
        return _is_int(value)
    if hint is float:
        return _is_number(value)
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(_fits(option, value) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)  # the class checks the allowed words itself
    return isinstance(value, hint)


def _name(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_name(option) for option in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))
