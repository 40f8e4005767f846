"""Access of callers to one model and its adapters. The policy of the caller's tenant decides.

Neither an error nor its timing reveals a model or an adapter that a caller may not use: the same steps run for a
forbidden name and for a name that does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Final

from cluster.api.adapters import SEPARATOR, AdapterSpec
from cluster.api.types import CatalogEntry
from cluster.gateway.models.adapters import ModelAdapters
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy

MAX_LISTS: Final = 64
"""Maximum number of results of `adapters_of` that are cached for each model."""
_LITERAL: Final = re.compile(r"[^*?\[]*")
_NO_ADAPTER: Final = AdapterSpec("", "", tenants=("",))
"""Used in place of an adapter that does not exist; no tenant may use it."""


class ModelAccess:
    """Decides which callers may use one model and its adapters."""

    def __init__(self, entry: CatalogEntry, adapters: ModelAdapters) -> None:
        """`adapters`: the model's adapters. When they change, the owner calls `update`."""
        self._adapters = adapters
        self._names: tuple[str, ...] = (entry.name, *entry.aliases)
        self._open_adapters: dict[tuple[str, tuple[str, ...]], Sequence[AdapterSpec]] = {}
        """Cached results of `adapters_of`, keyed by the tenant's name and the model patterns of its policy."""

    def update(self, entry: CatalogEntry) -> None:
        """Apply the name and aliases of a changed catalog entry, and forget cached results, because adapters may have
        changed."""
        self._names = (entry.name, *entry.aliases)
        self._open_adapters.clear()

    def allows(self, principal: Principal) -> bool:
        """Return whether the caller may use the model: the policy of the caller's tenant must allow one of the model's
        names."""
        return any(map(principal.tenant.allows, self._names))

    def allows_adapter(self, name: str, principal: Principal) -> bool:
        """Return whether the caller may use the adapter with this name. Three conditions: the adapter exists, it is not
        private to other tenants, and the policy of the caller's tenant allows the model or the adapter
        (`model:adapter`)."""
        # The same steps for missing and for private adapters, so that timing does not reveal which exist.
        spec, tenant = self._adapters.find(name) or _NO_ADAPTER, principal.tenant
        is_own = not spec.tenants or tenant.name in spec.tenants
        names = (f"{own}{SEPARATOR}{name}" for own in self._names)
        return (self.allows(principal) or any(map(tenant.allows, names))) and is_own

    def adapters_of(self, principal: Principal) -> Sequence[AdapterSpec]:
        """Return the adapters that a caller may use, sorted by name. The result is cached, since a model may have a
        thousand adapters and a policy many patterns."""
        key = (principal.tenant.name, tuple(principal.tenant.models))
        found = self._open_adapters.get(key)
        if found is None:
            if len(self._open_adapters) >= MAX_LISTS:
                self._open_adapters.clear()
            found = self._open_adapters[key] = self._find_adapters_of(principal.tenant)
        return found

    def _find_adapters_of(self, tenant: TenantPolicy) -> Sequence[AdapterSpec]:
        """Return the adapters that a tenant may use. To save time, adapter names are compared only with those patterns
        of the policy that an adapter of this model could match."""
        own = [spec for spec in self._adapters.specs if not spec.tenants or tenant.name in spec.tenants]
        if any(map(tenant.allows, self._names)):
            return own
        likely = list(self._likely_patterns(tenant))
        return [spec for spec in own if any(fnmatchcase(start + spec.name, pattern) for start, pattern in likely)]

    def may_allow_adapters(self, principal: Principal) -> bool:
        """Return whether the policy of the caller's tenant allows the model, or could allow one of the model's
        adapters."""
        return self.allows(principal) or any(True for _ in self._likely_patterns(principal.tenant))

    def _likely_patterns(self, tenant: TenantPolicy) -> Iterator[tuple[str, str]]:
        """Yield pairs of a prefix and a pattern of the tenant's policy. The prefix is one of the model's names followed
        by `:`. A pattern is yielded only if it could match an adapter's full name with this prefix."""
        for name in self._names:
            start = f"{name}{SEPARATOR}"
            yield from ((start, pattern) for pattern in tenant.models if _may_match(pattern, start))


def _may_match(pattern: str, start: str) -> bool:
    """Return whether a pattern of a policy could match a name that begins with `start`."""
    literal = _LITERAL.match(pattern)
    begin = literal[0] if literal is not None else ""
    return begin.startswith(start) or start.startswith(begin)
