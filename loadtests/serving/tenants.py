"""Tenant with a key and limits for our side of a load test, so that the full cost of a caller is measured.

The peers check no keys. Our side checks a key at every call, checks limits that are never reached, uses the fair queue,
and writes a usage record into SQLite.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.ledger.files import make_secret, read_secrets
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

TENANT = "loadtest"
LIMITS = TenantLimits(requests_per_minute=10**7, tokens_per_minute=10**10, concurrent_requests=10**6)


def sections(home: Path) -> dict[str, Any]:
    """Return the sections `auth` and `store` of a cluster.yaml, with files in `home`."""
    return {
        "auth": {
            "cluster_secret_file": str(home / "cluster-secret"),
            "api_keys": {"pepper_file": str(home / "key-pepper")},
        },
        "store": {"database_url": f"sqlite:///{home / 'ledger.db'}"},
    }


async def make_key(home: Path) -> str:
    """Create secrets, a ledger and a tenant without limits on models; return the tenant's key."""
    return (await make_keys(home, ("",)))[""]


async def make_tenants(home: Path, count: int) -> list[str]:
    """Create secrets, a ledger and `count` tenants that may use every model. Return one API key of each tenant."""
    names = [TENANT, *(f"{TENANT}-{number}" for number in range(2, count + 1))]
    keys = await asyncio.to_thread(_make_keys, home, {name: TenantPolicy(name, limits=LIMITS) for name in names})
    return list(keys.values())


async def make_keys(home: Path, classes: Sequence[str]) -> dict[str, str]:
    """Create secrets, a ledger and a tenant for each priority class ("" for the default class); return the keys by
    class.
    """
    policies = {}
    for cls in classes:
        policy = TenantPolicy(f"{TENANT}-{cls}" if cls else TENANT, limits=LIMITS)
        policies[cls] = dataclasses.replace(policy, priority_class=cls or policy.priority_class)
    return await asyncio.to_thread(_make_keys, home, policies)


def _make_keys(home: Path, policies: Mapping[str, TenantPolicy]) -> dict[str, str]:
    home.mkdir(parents=True, exist_ok=True)
    for name in ("cluster-secret", "key-pepper"):
        make_secret(home / name)
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}", peppers=read_secrets(home / "key-pepper", "key-pepper"))
    try:
        ledger.upgrade()
        keys = {}
        for name, policy in policies.items():
            ledger.tenants.create(policy)
            keys[name] = ledger.keys.create(policy.name).secret
        return keys
    finally:
        ledger.close()
