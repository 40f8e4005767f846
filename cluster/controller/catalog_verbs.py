"""Controller side of the admin verbs that change the catalog: adapts cluster.admin.v1 messages to CatalogService."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.admin.v1 import adapters_pb2 as adapters_pb
from cluster.admin.v1 import catalog_pb2 as pb
from cluster.api.adapters import AdapterSpec
from cluster.api.catalog import CatalogService, Change
from cluster.api.outcomes import invalid
from cluster.api.types import CatalogEntry
from cluster.wire.admin_forwarding import Verb, verb
from cluster.wire.codecs.admin_adapters import admin_adapter
from cluster.wire.codecs.version_status import version_status


def catalog_verbs(service: CatalogService) -> Mapping[str, Verb]:
    """Return the handlers of the catalog verbs by name."""

    async def apply(request: pb.ApplyRequest, actor: str) -> pb.ApplyResponse:
        entries = _entries(request.document)
        changes = service.apply(entries, prune=request.prune, validate_only=request.validate_only)
        return pb.ApplyResponse(changes=map(_change, changes))

    async def diff(request: pb.DiffRequest, actor: str) -> pb.DiffResponse:
        changes = service.diff(_entries(request.document), prune=request.prune)
        return pb.DiffResponse(changes=map(_change, changes))

    async def weigh(request: pb.SetWeightsRequest, actor: str) -> pb.VersionsResponse:
        if not 0 <= request.weight <= 1:  # also refuses NaN
            raise invalid("weight", f"must be in 0 to 1, got {request.weight:g}")
        return _versions(service.weigh(request.name, request.version, request.weight))

    async def promote(request: pb.PromoteRequest, actor: str) -> pb.VersionsResponse:
        return _versions(service.promote(request.name))

    async def roll_back(request: pb.RollbackRequest, actor: str) -> pb.VersionsResponse:
        return _versions(service.roll_back(request.name, request.reason or f"by {actor}"))

    async def quarantine(request: pb.QuarantineRequest, actor: str) -> pb.VersionsResponse:
        reason = request.reason or f"by {actor}"
        return _versions(service.quarantine(request.name, request.version, reason, lift=request.lift))

    async def load_adapter(request: adapters_pb.LoadAdapterRequest, actor: str) -> adapters_pb.LoadAdapterResponse:
        model, spec = service.load_adapter(
            request.name,
            AdapterSpec(
                name=request.adapter,
                source=request.source,
                digest=request.digest,
                tenants=tuple(request.tenants),
                pinned=request.pinned,
                license=request.license,
                version=request.version,
            ),
        )
        return adapters_pb.LoadAdapterResponse(adapter=admin_adapter(model, spec))

    async def unload_adapter(
        request: adapters_pb.UnloadAdapterRequest, actor: str
    ) -> adapters_pb.UnloadAdapterResponse:
        model, spec = service.unload_adapter(request.name, request.adapter)
        return adapters_pb.UnloadAdapterResponse(adapter=admin_adapter(model, spec))

    return {
        "Catalog.Apply": verb(pb.ApplyRequest, apply),
        "Catalog.Diff": verb(pb.DiffRequest, diff),
        "Catalog.SetWeights": verb(pb.SetWeightsRequest, weigh),
        "Catalog.Promote": verb(pb.PromoteRequest, promote),
        "Catalog.Rollback": verb(pb.RollbackRequest, roll_back),
        "Catalog.Quarantine": verb(pb.QuarantineRequest, quarantine),
        "Catalog.LoadAdapter": verb(adapters_pb.LoadAdapterRequest, load_adapter),
        "Catalog.UnloadAdapter": verb(adapters_pb.UnloadAdapterRequest, unload_adapter),
    }


def _entries(document: bytes) -> Sequence[Mapping[str, Any]]:
    try:
        values = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise invalid("document", f"is not JSON: {error}") from None
    entries = values.get("models") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry.get("name") for entry in entries):
        raise invalid("document", "must be an object with models, a list of objects that have a name")
    return entries


def _change(change: Change) -> pb.Change:
    def text(value: Any) -> str:
        return "" if value is None else json.dumps(value, sort_keys=True)

    differences = [
        pb.Difference(path=difference.path, before_json=text(difference.before), after_json=text(difference.after))
        for difference in change.differences
    ]
    return pb.Change(model=change.model, kind=change.kind, differences=differences, restarts=change.restarts)


def _versions(entry: CatalogEntry) -> pb.VersionsResponse:
    return pb.VersionsResponse(name=entry.name, versions=map(version_status, entry.versions))
