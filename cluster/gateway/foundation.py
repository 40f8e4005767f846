"""The parts of a gateway that need no other part."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cluster.config.schema import Config
from cluster.gateway import optional_parts
from cluster.gateway.quotas.local_limits import LimitsPort, LocalLimits
from cluster.observe.metrics import Metrics
from cluster.policy.limits.limits import Limiter
from cluster.process.place import pod_name

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.quotas.valkey_limits import ValkeyLimits
    from cluster.observe.span_export import SpanExport


@dataclass(frozen=True, slots=True)
class Foundation:
    """The parts on which all other parts of a gateway are built. A field is None if the configuration does not need its
    part."""

    config: Config
    process: int
    """Index of this process among `gateway.processes`."""
    folder: Path
    gateway_id: str
    metrics: Metrics
    tenants: TenantAuthenticator | None
    shared_limits: ValkeyLimits | None
    limits: LimitsPort
    """The limits that all gateways share; limits of this process if `shared_limits` is None."""
    span_export: SpanExport | None

    @classmethod
    def build(cls, config: Config, folder: Path, process: int) -> Self:
        """Build the parts of the foundation without starting them. Raises ValueError for an unusable secret file."""
        gateway_id = f"{pod_name() or config.name}-{uuid.uuid4().hex[:6]}"
        metrics = Metrics(config.name, config.observe.max_tenant_series)
        shared_limits = optional_parts.shared_limits(config, gateway_id)
        return cls(
            config=config,
            process=process,
            folder=folder,
            gateway_id=gateway_id,
            metrics=metrics,
            tenants=optional_parts.tenant_authenticator(config, folder, metrics, process),
            shared_limits=shared_limits,
            limits=shared_limits or LocalLimits(Limiter()),
            span_export=optional_parts.span_export(config, metrics),
        )
