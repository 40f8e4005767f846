"""Metadata of a call: everything beside its body."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL
from cluster.policy.tenants.identity import Principal


@dataclass(frozen=True, slots=True)
class CallMeta:
    """Context of a call. `api` is the name of the API that received it; `deadline` is a time of the service's clock,
    or None."""

    request_id: str
    api: str
    deadline: float | None = None
    traceparent: str = ""
    principal: Principal = DEFAULT_PRINCIPAL
    counted: bool = False
    """Whether the call is already counted as a request of its tenant (`CallService.count`)."""

    @property
    def tenant(self) -> str:
        """Name of its tenant."""
        return self.principal.tenant.name
