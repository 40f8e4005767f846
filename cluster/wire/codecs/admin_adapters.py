"""Conversion of adapters to messages of the admin API, for the controller and the gateway."""

from __future__ import annotations

from cluster.admin.v1 import adapters_pb2 as pb
from cluster.api.adapters import AdapterSpec


def admin_adapter(model: str, spec: AdapterSpec) -> pb.Adapter:
    """Return the admin API's message for an adapter of a model. The message lacks the adapter's state on workers."""
    return pb.Adapter(
        model=model,
        name=spec.name,
        source=spec.source,
        digest=spec.digest,
        tenants=spec.tenants,
        pinned=spec.pinned,
        license=spec.license,
        version=spec.version,
        load_number=spec.load_number,
    )
