"""Removal of usage and audit rows that are older than the retention. A tenant's policy may override the cluster's
retention in days.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import Retention

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Expired:
    """Numbers of rows that `expire` has removed from the usage table and from the audit table."""

    usage: int
    audit: int


def expire(ledger: Ledger, now_s: float, *, usage_days: int, audit_days: int) -> Expired:
    """Remove usage and audit rows that are older than the retention.

    `usage_days` and `audit_days`: the cluster's retention in days. A tenant's own `retention` overrides these values.
    """
    own: dict[str, Retention] = {}
    after = ""
    while page := ledger.tenants.list(after=after):
        own |= {tenant.policy.name: tenant.policy.retention for tenant in page}
        after = page[-1].policy.name
    usage_own = {name: kept.usage_days for name, kept in own.items() if kept.usage_days is not None}
    audit_own = {name: kept.audit_days for name, kept in own.items() if kept.audit_days is not None}
    usage = ledger.usage.expire(now_s - usage_days * DAY_S, except_tenants=list(usage_own))
    usage += sum(ledger.usage.expire(now_s - days * DAY_S, tenant=name) for name, days in usage_own.items())
    audit = ledger.audit.expire(now_s - audit_days * DAY_S, except_tenants=list(audit_own))
    audit += sum(ledger.audit.expire(now_s - days * DAY_S, tenant=name) for name, days in audit_own.items())
    ledger.notices.expire(now_s)
    ledger.resumed_segments.expire(now_s)
    return Expired(usage, audit)
