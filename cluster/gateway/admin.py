"""cluster.admin.v1 of any gateway: its fleet, its calls and its catalog. See admin_door.py for who may ask."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from cluster.admin.v1 import admin_pb2 as pb
from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.admin_door import AdminDoor, Asker
from cluster.gateway.directory import Directory, KnownModel
from cluster.gateway.dispatch import Dispatcher
from cluster.gateway.grpc_face import paginate
from cluster.gateway.service import CallService
from cluster.link.hub import Hub
from cluster.link.worker_link import WorkerLink

if TYPE_CHECKING:
    from cluster.gateway.sibling_aborts import SiblingAborts


class FleetAdmin:
    """Workers with a link to this gateway, and the calls that it runs."""

    def __init__(self, hub: Hub, service: CallService, door: AdminDoor, siblings: SiblingAborts | None = None) -> None:
        self._hub = hub
        self._siblings = siblings
        self._service = service
        self._door = door

    async def ListWorkers(self, request: pb.ListWorkersRequest, asker: Asker) -> pb.ListWorkersResponse:
        """By worker id."""
        links = {link.identity.worker_id: link for link in self._hub.links}
        page, token = paginate(sorted(links), request.page_size, request.page_token)
        return pb.ListWorkersResponse(workers=[_worker(links[key]) for key in page], next_page_token=token)

    async def AbortRequest(self, request: pb.AbortRequestRequest, asker: Asker) -> pb.AbortRequestResponse:
        """Of this host's processes: other gateways do not tell each other of calls."""
        wanted, tenant = request.request_id, ""
        if not wanted:
            raise invalid("request_id", "must name a call: its x-request-id, or the id of its answer")
        if not request.reason.strip():
            raise invalid("reason", "must say why; it goes to the audit log")
        if request.parent:
            from cluster.gateway.admin_codec import tenant_name

            tenant = tenant_name(request.parent, "parent")
        ended, silent = self._service.abort(wanted, tenant), 0
        if self._siblings is not None:
            more, silent = await self._siblings.abort(wanted, tenant)
            ended += more
        outcome = "ok" if ended else Outcome.NOT_FOUND.value
        details = {"aborted": len(ended), "tenants": sorted(set(ended))}
        whose = ended[0] if len(set(ended)) == 1 else tenant
        self._door.audit(
            asker, "admin", "fleet.abort", wanted, outcome=outcome, reason=request.reason, tenant=whose, details=details
        )
        if not ended:
            message = f"no call of request id {wanted[:128]!r} runs on this gateway; if there are others, ask them too"
            unasked = f" ({silent} of its processes did not answer)" if silent else ""
            raise CallError(Outcome.NOT_FOUND, message + unasked)
        return pb.AbortRequestResponse(aborted=len(ended), tenants=ended)


class CatalogAdmin:
    """Models as this gateway knows them."""

    def __init__(self, hub: Hub, directory: Directory, dispatcher: Dispatcher) -> None:
        self._hub = hub
        self._directory = directory
        self._dispatcher = dispatcher

    async def List(self, request: pb.ListRequest, asker: Asker) -> pb.ListResponse:
        """By name."""
        page, token = paginate([m.name for m in self._directory.models], request.page_size, request.page_token)
        entries = [self._entry(self._directory.resolve(name)) for name in page]
        heard = self._hub.catalog_at
        age_s = -1.0 if heard is None else time.monotonic() - heard
        return pb.ListResponse(models=entries, next_page_token=token, age_s=age_s)

    async def Get(self, request: pb.GetRequest, asker: Asker) -> pb.CatalogEntry:
        """By name or alias."""
        return self._entry(self._directory.resolve(request.name))

    def _entry(self, model: KnownModel) -> pb.CatalogEntry:
        entry = model.entry
        link = next(iter(model.links.values()), None)
        waiting, _ = self._dispatcher.waiting(model.name)
        return pb.CatalogEntry(
            name=entry.name,
            aliases=entry.aliases,
            state=model.state.value,
            state_reason="" if link else entry.state_reason,
            replicas=entry.replicas,
            replicas_desired=entry.replicas_desired,
            version=entry.version,
            revision=entry.revision,
            max_model_len=model.max_model_len,
            weight_digest=link.identity.weight_digest if link else next(iter(entry.weight_digests), ""),
            bundle_digest=model.bundle_digest,
            ready_workers=sum(not link.draining for link in model.links.values()),
            waiting=waiting,
            note=entry.note if model.in_catalog else "not in the catalog: known by its workers alone",
        )


def _worker(link: WorkerLink) -> pb.Worker:
    return pb.Worker(
        worker_id=link.identity.worker_id,
        incarnation=link.identity.incarnation,
        model=link.identity.model,
        node=link.identity.node,
        ray_cluster=link.identity.ray_cluster,
        state="DRAINING" if link.draining else "READY",
        running=link.load.running,
        waiting=link.load.waiting,
        kv_usage=link.load.kv_usage,
        step_ms=link.load.step_s * 1000,
        max_num_seqs=link.info.max_num_seqs,
        engine_path=link.info.engine_path,
        engine_path_reason=link.info.engine_path_reason,
        engine_version=link.info.engine_version,
        engine_class=link.info.engine_class,
        free_sequences=link.free.sequences,
        kv_tokens=link.info.kv_tokens,
    )


class NoLedger:
    """Tenants, Keys, Usage and Audit of a gateway that keeps none."""

    def __getattr__(self, name: str) -> object:
        return self._refuse

    @staticmethod
    def _refuse(request: Message, asker: Asker) -> None:
        message = "this gateway has one tenant, no keys and no ledger: set auth in its configuration"
        raise CallError(Outcome.UNSUPPORTED_FEATURE, message)
