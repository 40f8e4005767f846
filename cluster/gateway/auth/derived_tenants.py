"""Two values for each tenant, which a gateway derives from the cluster's secrets: the handle, by which workers know the
tenant, and the salt of the tenant's prefix cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from cluster.policy.tenants.identity import Principal, cache_salt, tenant_handle
from cluster.policy.tenants.policy import TenantPolicy


class DerivedTenants:
    """The handles and cache salts of tenants. A handle identifies a tenant to workers. A tenant's handle and salt are
    computed once for each version of the tenant's policy."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`secrets`: the cluster's secrets."""
        self._secrets = secrets
        self._derived: dict[str, tuple[TenantPolicy, TenantPolicy, str]] = {}
        self._handles: Mapping[str, str] = {}
        self.weights: Mapping[str, float] = {}
        """The weight of each tenant, by the tenant's handle."""

    def set_tenants(self, policies: Iterable[TenantPolicy]) -> None:
        """Set all tenants, so that `weights` has their handles. The thread that reads the database calls this, since
        10,000 handles take a tenth of a second."""
        known, policies = self._handles, list(policies)
        self._handles = {p.name: known.get(p.name) or tenant_handle(self._secrets, p.name) for p in policies}
        self.weights = {self._handles[p.name]: p.weight for p in policies}

    def with_handle(self, principal: Principal) -> Principal:
        """Return the principal with its tenant's handle, which identifies the tenant to workers."""
        tenant = self._derive(principal.tenant)[1]
        return Principal(tenant, principal.role, principal.by, principal.subject, principal.model_aliases)

    def cache_salt(self, policy: TenantPolicy, own: str) -> str:
        """Return the prefix-cache salt of a tenant's call. `own`: the salt in the request; "" for none."""
        return cache_salt(self._secrets, policy, own) if own else self._derive(policy)[2]

    def _derive(self, policy: TenantPolicy) -> tuple[TenantPolicy, TenantPolicy, str]:
        """Return three values: the tenant's policy from the snapshot, a copy of it with the tenant's handle (the id by
        which workers know the tenant), and the tenant's cache salt. `policy` may be the policy from the snapshot or an
        earlier copy with a handle."""
        cached = self._derived.get(policy.name)
        if cached is None or (policy is not cached[0] and policy is not cached[1]):
            handle = tenant_handle(self._secrets, policy.name)
            cached = (policy, replace(policy, handle=handle), cache_salt(self._secrets, policy))
            self._derived[policy.name] = cached
        return cached
