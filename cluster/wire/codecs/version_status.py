"""Conversion of a model version's state to the admin API's VersionStatus, for the gateway and the controller."""

from __future__ import annotations

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.api.types import VersionShare


def version_status(share: VersionShare) -> pb.VersionStatus:
    """Return the admin API's VersionStatus of a model version."""
    return pb.VersionStatus(
        version=share.version,
        weight=share.weight,
        state=share.state.value,
        state_reason=share.state_reason,
        revision=share.revision,
        weight_digest=next(iter(share.weight_digests), ""),
        replicas=share.replicas,
        replicas_desired=share.replicas_desired,
        quarantined=share.quarantined,
    )
