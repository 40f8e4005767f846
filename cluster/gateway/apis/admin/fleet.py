"""cluster.admin.v1 of any gateway: its fleet, its calls and its catalog, and what it passes on to workers. See
authorization.py for who may ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from cluster.admin.v1 import admin_pb2 as pb
from cluster.admin.v1 import catalog_pb2
from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.api.types import DrainState, VersionShare
from cluster.controller.catalog_verbs import version_status
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminCaller
from cluster.gateway.apis.grpc.inference import paginate
from cluster.gateway.links.hub import Hub
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.service import CallService
from cluster.link.v1 import link_pb2 as link_pb

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.sibling_aborts import SiblingAborts

DRAIN_S = 300.0
MAX_DRAIN_S = 7 * 86_400.0


class FleetAdmin:
    """Workers with a link to this gateway, and the calls that it runs."""

    def __init__(
        self, hub: Hub, service: CallService, door: AdminAuthorizer, siblings: SiblingAborts | None = None
    ) -> None:
        self._hub = hub
        self._siblings = siblings
        self._service = service
        self._door = door

    async def ListWorkers(self, request: pb.ListWorkersRequest, asker: AdminCaller) -> pb.ListWorkersResponse:
        """By worker id."""
        links = {link.identity.worker_id: link for link in self._hub.links}
        page, token = paginate(sorted(links), request.page_size, request.page_token)
        return pb.ListWorkersResponse(workers=[_worker(links[key]) for key in page], next_page_token=token)

    async def Drain(self, request: pb.DrainRequest, asker: AdminCaller) -> pb.DrainResponse:
        """Each worker tells all its gateways; nothing that runs is cut."""
        timeout_s = request.timeout_s or DRAIN_S
        if not 0 < timeout_s <= MAX_DRAIN_S:  # not a number, too
            raise invalid("timeout_s", f"is not between 0 and {MAX_DRAIN_S:g}")
        command = link_pb.Command(drain=link_pb.Drain(timeout_ms=int(timeout_s * 1000)))
        links = self._tell("fleet.drain", request.target, command, asker)
        return pb.DrainResponse(workers=[_worker(link) for link in links], notes=self._alone(links))

    async def Cordon(self, request: pb.CordonRequest, asker: AdminCaller) -> pb.CordonResponse:
        """Nothing new; what runs stays."""
        links = self._tell("fleet.cordon", request.target, link_pb.Command(cordon=link_pb.Cordon()), asker)
        return pb.CordonResponse(workers=[_worker(link) for link in links], notes=self._alone(links))

    async def Uncordon(self, request: pb.UncordonRequest, asker: AdminCaller) -> pb.UncordonResponse:
        """Work comes again."""
        links = self._tell("fleet.uncordon", request.target, link_pb.Command(uncordon=link_pb.Uncordon()), asker)
        return pb.UncordonResponse(workers=[_worker(link) for link in links])

    def _tell(self, action: str, target: str, command: link_pb.Command, asker: AdminCaller) -> Sequence[WorkerLink]:
        """Pass a command on to one worker, or to all of a node."""
        found = _meant(self._hub.links, target)
        if not found:
            known = "no worker and no node or pod of this gateway's workers"
            what = f"{known} is called {target[:128]!r}; ListWorkers names them"
            raise invalid("target", what if target else "is empty: name a worker or a node, or a pod")
        for link in found:
            link.command(command)
        self._door.audit(asker, "admin", action, target, details={"workers": [one.identity.worker_id for one in found]})
        return found

    def _alone(self, links: Sequence[WorkerLink]) -> Sequence[str]:
        """Models that are left without a worker that takes calls."""
        stays = {one.identity.model for one in self._hub.links if one.serves and one not in links}
        return [
            f"model {model} has no other worker that takes calls: new ones wait until one comes, or this is uncordoned"
            for model in sorted({link.identity.model for link in links} - stays)
        ]

    async def AbortRequest(self, request: pb.AbortRequestRequest, asker: AdminCaller) -> pb.AbortRequestResponse:
        """Of this host's processes: other gateways do not tell each other of calls."""
        wanted, tenant = request.request_id, ""
        if not wanted:
            raise invalid("request_id", "must name a call: its x-request-id, or the id of its answer")
        if not request.reason.strip():
            raise invalid("reason", "must say why; it goes to the audit log")
        if request.parent:
            from cluster.gateway.apis.admin.codec import tenant_name

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

    def __init__(self, hub: Hub, directory: ModelDirectory, scheduler: Scheduler) -> None:
        self._hub = hub
        self._directory = directory
        self._scheduler = scheduler

    async def List(self, request: pb.ListRequest, asker: AdminCaller) -> pb.ListResponse:
        """By name."""
        page, token = paginate([m.name for m in self._directory.models], request.page_size, request.page_token)
        entries = [self._entry(model) for name in page if (model := self._directory.find(name)) is not None]
        heard = self._hub.catalog_at
        age_s = -1.0 if heard is None else time.monotonic() - heard
        return pb.ListResponse(models=entries, next_page_token=token, age_s=age_s)

    async def Get(self, request: pb.GetRequest, asker: AdminCaller) -> pb.CatalogEntry:
        """By name or alias."""
        return self._entry(self._directory.resolve(request.name, began=True))

    def _entry(self, model: KnownModel) -> pb.CatalogEntry:
        entry = model.entry
        link = next(iter(model.links.values()), None)
        waiting, _ = self._scheduler.queues.waiting(model.name)
        return pb.CatalogEntry(
            name=entry.name,
            aliases=entry.aliases,
            state=model.state.value,
            state_reason=entry.state_reason if link is None or entry.state is model.state else "",
            replicas=entry.replicas,
            replicas_desired=entry.replicas_desired,
            version=entry.version,
            revision=entry.revision,
            max_model_len=model.max_model_len,
            weight_digest=link.identity.weight_digest if link else next(iter(entry.weight_digests), ""),
            bundle_digest=model.bundle_digest,
            ready_workers=sum(link.serves for link in model.links.values()),
            waiting=waiting,
            note="" if model.in_catalog else "not in the catalog: known by its workers alone",
            versions=[self._version(model, share) for share in entry.versions],
            license=entry.license,
            family=entry.family,
            card=entry.card,
            fallback=entry.fallback,
        )

    @staticmethod
    def _version(model: KnownModel, share: VersionShare) -> catalog_pb2.VersionStatus:
        status = version_status(share)
        mine = [link for link in model.links.values() if link.identity.version == share.version]
        status.ready_workers = sum(map(model.takes, mine))
        return status


def _meant(links: Sequence[WorkerLink], target: str) -> Sequence[WorkerLink]:
    """The worker of that id; else all of the pod or the node of that name, or of the node with that id in Ray."""
    if not target:
        return ()
    named = [link for link in links if link.identity.worker_id == target]
    return named or [link for link in links if target in (link.identity.pod, link.identity.host, link.identity.node)]


def _state(link: WorkerLink) -> str:
    """DRAINED only while nothing runs: what was on its way when it was told so may have come still."""
    if link.standing is DrainState.DRAINED and (link.running or link.load.running):
        return DrainState.DRAINING.value
    return "READY" if link.serves else link.standing.value


def _worker(link: WorkerLink) -> pb.Worker:
    return pb.Worker(
        worker_id=link.identity.worker_id,
        incarnation=link.identity.incarnation,
        model=link.identity.model,
        node=link.identity.node,
        ray_cluster=link.identity.ray_cluster,
        state=_state(link),
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
        pod=link.identity.pod,
        host=link.identity.host,
        gpu=link.identity.gpu,
        capabilities=link.info.capabilities,
    )


class NoLedger:
    """Tenants, Keys, Usage and Audit of a gateway that keeps none."""

    def __getattr__(self, name: str) -> object:
        return self._refuse

    @staticmethod
    def _refuse(request: Message, asker: AdminCaller) -> None:
        message = "this gateway has one tenant, no keys and no ledger: set auth in its configuration"
        raise CallError(Outcome.UNSUPPORTED_FEATURE, message)
