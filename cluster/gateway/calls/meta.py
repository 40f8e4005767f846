"""Metadata of a call, which is everything except the call's body."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.policy.tenants.identity import Principal


@dataclass(slots=True)
class CallMeta:
    """Metadata of one call. `api` is the name of the API that received the call. `deadline` is a time of the service's
    clock, or None."""

    request_id: str
    api: str
    deadline: float | None = None
    traceparent: str = ""
    principal: Principal = DEFAULT_PRINCIPAL
    affinity_key: str = ""
    """Value of the header x-headrace-affinity, for APIs whose bodies have no such field."""
    counted: bool = False
    """Whether the call is already counted as a request of the call's tenant (`CallService.count`)."""

    @property
    def tenant(self) -> str:
        """Name of the call's tenant."""
        return self.principal.tenant.name
