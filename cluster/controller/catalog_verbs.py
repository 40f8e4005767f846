"""The verbs of cluster.admin.v1 that change the catalog, as the controller answers them: messages in, the desk's words,
messages out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.admin.v1 import catalog_pb2 as pb
from cluster.api.catalog import CatalogService, Change
from cluster.api.outcomes import invalid
from cluster.api.types import CatalogEntry, VersionShare
from cluster.wire.admin_forwarding import Verb, verb


def catalog_verbs(desk: CatalogService) -> Mapping[str, Verb]:
    """By their names."""

    async def apply(request: pb.ApplyRequest, actor: str) -> pb.ApplyResponse:
        entries = _entries(request.document)
        changes = desk.apply(entries, prune=request.prune, validate_only=request.validate_only)
        return pb.ApplyResponse(changes=map(_change, changes))

    async def diff(request: pb.DiffRequest, actor: str) -> pb.DiffResponse:
        changes = desk.apply(_entries(request.document), prune=request.prune, validate_only=True)
        return pb.DiffResponse(changes=map(_change, changes))

    async def weigh(request: pb.SetWeightsRequest, actor: str) -> pb.VersionsResponse:
        if not 0 <= request.weight <= 1:  # not a number, too
            raise invalid("weight", f"must be in 0 to 1, got {request.weight:g}")
        return _versions(desk.weigh(request.name, request.version, request.weight))

    async def promote(request: pb.PromoteRequest, actor: str) -> pb.VersionsResponse:
        return _versions(desk.promote(request.name))

    async def roll_back(request: pb.RollbackRequest, actor: str) -> pb.VersionsResponse:
        return _versions(desk.roll_back(request.name, request.reason or f"by {actor}"))

    async def quarantine(request: pb.QuarantineRequest, actor: str) -> pb.VersionsResponse:
        reason = request.reason or f"by {actor}"
        return _versions(desk.quarantine(request.name, request.version, reason, lift=request.lift))

    return {
        "Catalog.Apply": verb(pb.ApplyRequest, apply),
        "Catalog.Diff": verb(pb.DiffRequest, diff),
        "Catalog.SetWeights": verb(pb.SetWeightsRequest, weigh),
        "Catalog.Promote": verb(pb.PromoteRequest, promote),
        "Catalog.Rollback": verb(pb.RollbackRequest, roll_back),
        "Catalog.Quarantine": verb(pb.QuarantineRequest, quarantine),
    }


def _entries(document: bytes) -> Sequence[Mapping[str, Any]]:
    try:
        values = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise invalid("document", f"is not JSON: {error}") from None
    entries = values.get("models") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not all(isinstance(one, dict) and one.get("name") for one in entries):
        raise invalid("document", "must be an object with models, a list of objects that have a name")
    return entries


def _change(change: Change) -> pb.Change:
    def text(value: Any) -> str:
        return "" if value is None else json.dumps(value, sort_keys=True)

    differences = [
        pb.Difference(path=one.path, before_json=text(one.before), after_json=text(one.after))
        for one in change.differences
    ]
    return pb.Change(model=change.model, kind=change.kind, differences=differences, restarts=change.restarts)


def _versions(entry: CatalogEntry) -> pb.VersionsResponse:
    return pb.VersionsResponse(name=entry.name, versions=map(version_status, entry.versions))


def version_status(share: VersionShare) -> pb.VersionStatus:
    """A version as operators see it."""
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
