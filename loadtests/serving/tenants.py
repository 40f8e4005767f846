"""A tenant with a key and limits for our side of a load test, so that what a caller costs is measured whole.

The peers check no keys; ours checks one at every call, asks limits that are never reached, takes turns, and writes a
usage record into SQLite.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from cluster.ledger.files import make_secret, read_secrets
from cluster.ledger.store import Ledger
from cluster.tenancy.policy import TenantLimits, TenantPolicy

TENANT = "loadtest"
LIMITS = TenantLimits(requests_per_minute=10**7, tokens_per_minute=10**10, concurrent_requests=10**6)


def sections(home: Path) -> dict[str, Any]:
    """`auth` and `store` of a cluster.yaml over files in `home`."""
    return {
        "auth": {
            "cluster_secret_file": str(home / "cluster-secret"),
            "api_keys": {"pepper_file": str(home / "key-pepper")},
        },
        "store": {"database_url": f"sqlite:///{home / 'ledger.db'}"},
    }


async def make_key(home: Path) -> str:
    """Secrets, a ledger, a tenant that may use all, and its key."""
    return await asyncio.to_thread(_make_key, home)


def _make_key(home: Path) -> str:
    home.mkdir(parents=True, exist_ok=True)
    for name in ("cluster-secret", "key-pepper"):
        make_secret(home / name)
    ledger = Ledger(f"sqlite:///{home / 'ledger.db'}", peppers=read_secrets(home / "key-pepper", "key-pepper"))
    try:
        ledger.upgrade()
        ledger.tenants.create(TenantPolicy(TENANT, limits=LIMITS))
        return ledger.keys.create(TENANT).secret
    finally:
        ledger.close()
