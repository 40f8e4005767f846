"""Values read from a ledger, directly or over the admin API. This module imports no SQLAlchemy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.ledger.errors import LedgerError
from cluster.policy.tenants.policy import TenantPolicy

COUNTS = (
    "requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "generated_tokens",
    "gpu_seconds",
)
DIMENSIONS = ("tenant", "model", "day", "month", "key_id", "version", "adapter", "outcome", "gpu")
LABEL = re.compile(r"^label:([A-Za-z0-9_./-]{1,63})$")
_DAY = re.compile(r"^\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """A query for usage sums.

    `group_by` holds names from DIMENSIONS, or `label:<name>`. Days are UTC days; `until_day` is inclusive.
    """

    group_by: tuple[str, ...] = ("tenant", "model")
    since_day: str = ""
    until_day: str = ""
    tenant: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for name in self.group_by:
            if name not in DIMENSIONS and not LABEL.match(name):
                raise LedgerError(f"group_by: {name!r} must be one of {', '.join(DIMENSIONS)} or label:<name>")
        if len(set(self.group_by)) != len(self.group_by):
            raise LedgerError("group_by: names the same dimension twice")
        for name in ("since_day", "until_day"):
            if getattr(self, name) and not _DAY.match(getattr(self, name)):
                raise LedgerError(f"{name}: must be a day like 2026-11-24")


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of a GPU hour by accelerator type. The key `""` has the price for usage records without a type."""

    currency: str
    gpu_hour: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StoredTenant:
    """A tenant as stored in the database. Times are seconds since the epoch."""

    policy: TenantPolicy
    origin: str
    created_at: float
    updated_at: float
    model_aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredKey:
    """The metadata of a stored key, without the key and the key's digest. Times are seconds since the epoch."""

    id: str
    tenant: str
    name: str
    role: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    rotated_from: str = ""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just created. `secret` is the whole key, which is neither stored nor shown in the repr."""

    stored: StoredKey
    secret: str

    def __repr__(self) -> str:
        return f"NewKey({self.stored!r})"


def key_state(stored: StoredKey, now_s: float) -> str:
    """Return the state of a key: active, expired or revoked."""
    if stored.revoked_at is not None:
        return "revoked"
    return "expired" if stored.expires_at is not None and stored.expires_at <= now_s else "active"
