"""The Fleet and Catalog services of cluster.admin.v1: workers, running calls and models of one gateway.

authorization.py decides which callers may use the two services.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from cluster.admin.v1 import adapters_pb2, catalog_pb2, routing_pb2
from cluster.admin.v1 import admin_pb2 as pb
from cluster.api.adapters import AdapterSpec, full_name
from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.api.types import MAX_INT32, VersionShare
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminCaller
from cluster.gateway.apis.grpc.inference import paginate
from cluster.gateway.call_service import CallService
from cluster.gateway.console.overview.live import LiveOverview
from cluster.gateway.console.overview.rows import worker_state
from cluster.gateway.links.hub import Hub
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.link.v1 import link_pb2 as link_pb
from cluster.wire.codecs.admin_adapters import admin_adapter
from cluster.wire.codecs.version_status import version_status

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.routes import RouteExplainer
    from cluster.gateway.apis.admin.siblings import Siblings

DRAIN_S = 300.0
MAX_DRAIN_S = 7 * 86_400.0


class FleetAdmin:
    """The Fleet service: the workers that are linked to this gateway, and the calls that this gateway runs."""

    def __init__(
        self,
        hub: Hub,
        service: CallService,
        authorizer: AdminAuthorizer,
        explainer: RouteExplainer,
        live: LiveOverview,
        siblings: Siblings | None = None,
    ) -> None:
        """`siblings`: the other processes of this gateway, if any."""
        self._hub = hub
        self._live = live
        self._explainer = explainer
        self._siblings = siblings
        self._service = service
        self._authorizer = authorizer

    async def ListWorkers(self, request: pb.ListWorkersRequest, caller: AdminCaller) -> pb.ListWorkersResponse:
        """List the linked workers, sorted by worker id."""
        links = {link.identity.worker_id: link for link in self._hub.links}
        page, token = paginate(sorted(links), request.page_size, request.page_token)
        return pb.ListWorkersResponse(workers=[_worker(links[key]) for key in page], next_page_token=token)

    async def Drain(self, request: pb.DrainRequest, caller: AdminCaller) -> pb.DrainResponse:
        """Drain workers. Each worker reports the drain to all gateways that it is linked to. Running calls end
        normally."""
        timeout_s = request.timeout_s or DRAIN_S
        if not 0 < timeout_s <= MAX_DRAIN_S:  # also false for NaN
            raise invalid("timeout_s", f"must be above 0 and at most {MAX_DRAIN_S:g} s")
        command = link_pb.Command(drain=link_pb.Drain(timeout_ms=int(timeout_s * 1000)))
        links = self._send_command("fleet.drain", request.target, command, caller)
        return pb.DrainResponse(workers=[_worker(link) for link in links], notes=self._notes_on_lost_models(links))

    async def Cordon(self, request: pb.CordonRequest, caller: AdminCaller) -> pb.CordonResponse:
        """Cordon workers. A cordoned worker takes no new calls; running calls continue."""
        links = self._send_command("fleet.cordon", request.target, link_pb.Command(cordon=link_pb.Cordon()), caller)
        return pb.CordonResponse(workers=[_worker(link) for link in links], notes=self._notes_on_lost_models(links))

    async def Uncordon(self, request: pb.UncordonRequest, caller: AdminCaller) -> pb.UncordonResponse:
        """Let workers take calls again."""
        links = self._send_command(
            "fleet.uncordon", request.target, link_pb.Command(uncordon=link_pb.Uncordon()), caller
        )
        return pb.UncordonResponse(workers=[_worker(link) for link in links])

    def _send_command(
        self, action: str, target: str, command: link_pb.Command, caller: AdminCaller
    ) -> Sequence[WorkerLink]:
        """Send a command to one worker, or to all workers of a node or pod."""
        targets = _matching_links(self._hub.links, target)
        if not targets:
            unknown = f"no worker, node or pod of this gateway is called {target[:128]!r}; ListWorkers lists them"
            raise invalid("target", unknown if target else "is empty: name a worker or a node, or a pod")
        for link in targets:
            link.box.command(command)
        self._authorizer.audit(
            caller, "admin", action, target, details={"workers": [link.identity.worker_id for link in targets]}
        )
        return targets

    def _notes_on_lost_models(self, links: Sequence[WorkerLink]) -> Sequence[str]:
        """Return one note for each model that is served only by the workers of `links`."""
        still_served = {
            link.identity.model for link in self._hub.links if link.takes_new_requests and link not in links
        }
        return [
            f"model {model} has no other worker that takes calls: new calls wait for a new worker or for Uncordon"
            for model in sorted({link.identity.model for link in links} - still_served)
        ]

    async def AbortRequest(self, request: pb.AbortRequestRequest, caller: AdminCaller) -> pb.AbortRequestResponse:
        """Abort a call that runs in any gateway process of this host. Gateways on other hosts are not reached."""
        wanted, tenant = request.request_id, ""
        if not wanted:
            raise invalid("request_id", "must name a call by its x-request-id or by the id of its answer")
        if not request.reason.strip():
            raise invalid("reason", "must not be empty; it is written to the audit log")
        if request.parent:
            from cluster.gateway.apis.admin.codec import tenant_name

            tenant = tenant_name(request.parent, "parent")
        ended, unanswered = self._service.abort(wanted, tenant), 0
        if self._siblings is not None:
            wanted_there = pb.AbortRequestRequest(request_id=wanted, parent=tenant)
            answers, unanswered = await self._siblings.ask("AbortRequest", wanted_there)
            ended += [tenant for answer in answers for tenant in answer.tenants]
        outcome = "ok" if ended else Outcome.NOT_FOUND.value
        details = {"aborted": len(ended), "tenants": sorted(set(ended))}
        audited_tenant = ended[0] if len(set(ended)) == 1 else tenant
        self._authorizer.audit(
            caller,
            "admin",
            "fleet.abort",
            wanted,
            outcome=outcome,
            reason=request.reason,
            tenant=audited_tenant,
            details=details,
        )
        if not ended:
            message = (
                f"no call with request id {wanted[:128]!r} is running on this gateway; try the other gateways, if any"
            )
            silent_note = f" ({unanswered} of its processes did not answer)" if unanswered else ""
            raise CallError(Outcome.NOT_FOUND, message + silent_note)
        return pb.AbortRequestResponse(aborted=len(ended), tenants=ended)

    async def ExplainRequest(
        self, request: routing_pb2.ExplainRequestRequest, caller: AdminCaller
    ) -> routing_pb2.ExplainRequestResponse:
        """Explain to which workers the sequences of a call were sent, and why. All gateway processes of this host are
        asked."""
        return await self._explainer.explain(request, caller)

    async def GetOverview(self, request: pb.GetOverviewRequest, caller: AdminCaller) -> pb.GetOverviewResponse:
        """Return the state of the cluster as the caller may see it."""
        from cluster.gateway.console.overview import deltas

        document = await self._live.document(caller.scope)
        if not request.with_calls:
            document = document | {"calls": []}
        return pb.GetOverviewResponse(document=await deltas.encode(document))


class CatalogAdmin:
    """The Catalog service: the models that this gateway knows, with their state."""

    def __init__(self, hub: Hub, directory: ModelDirectory, scheduler: Scheduler) -> None:
        self._hub = hub
        self._directory = directory
        self._scheduler = scheduler

    async def List(self, request: pb.ListRequest, caller: AdminCaller) -> pb.ListResponse:
        """List the models, sorted by name."""
        page, token = paginate([m.name for m in self._directory.models], request.page_size, request.page_token)
        entries = [self._entry(model) for name in page if (model := self._directory.find(name)) is not None]
        heard_at = self._hub.controller.heard_at
        age_s = -1.0 if heard_at is None else time.monotonic() - heard_at
        return pb.ListResponse(models=entries, next_page_token=token, age_s=age_s)

    async def Get(self, request: pb.GetRequest, caller: AdminCaller) -> pb.CatalogEntry:
        """Look up one model by name or alias."""
        return self._entry(self._directory.lookup.resolve(request.name, began=True))

    async def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, caller: AdminCaller
    ) -> adapters_pb2.ListAdaptersResponse:
        """List the adapters of all models, or of the model that the request names, with the adapters' state on this
        gateway's workers."""
        directory, name = self._directory, request.name
        models = [directory.lookup.resolve(name, began=True)] if name else directory.models
        known = {full_name(model.name, spec.name): (model, spec) for model in models for spec in model.adapters.specs}
        page, token = paginate(sorted(known), request.page_size, request.page_token)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[_adapter(*known[each]) for each in page], next_page_token=token
        )

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
            max_model_len=model.capabilities.max_model_len,
            weight_digest=link.identity.weight_digest if link else next(iter(entry.weight_digests), ""),
            bundle_digest=model.versions.bundle_digest(),
            ready_workers=sum(link.takes_new_requests for link in model.links.values()),
            waiting=waiting,
            note="" if model.in_catalog else "not in the catalog: known only from its workers",
            versions=[self._version(model, share) for share in entry.versions],
            license=entry.license,
            family=entry.family,
            card=entry.card,
            fallback=entry.fallback,
            default_sampling={
                name: value
                for name, value in model.versions.default_sampling().items()
                if isinstance(value, int | float)
            },
        )

    @staticmethod
    def _version(model: KnownModel, share: VersionShare) -> catalog_pb2.VersionStatus:
        status = version_status(share)
        version_links = [link for link in model.links.values() if link.identity.version == share.version]
        status.ready_workers = sum(map(model.takes_calls, version_links))
        return status


def _adapter(model: KnownModel, spec: AdapterSpec) -> adapters_pb2.Adapter:
    message, view = admin_adapter(model.name, spec), model.adapters.view(spec.name)
    message.digest = model.adapters.digest(spec.name)
    message.state, message.reason = view.state.value, view.reason
    message.ready_workers, message.workers = view.ready, view.workers
    for worker_id, reason in view.failures:
        message.failures.add(worker_id=worker_id, reason=reason)
    return message


def _matching_links(links: Sequence[WorkerLink], target: str) -> Sequence[WorkerLink]:
    """Return the links of the workers that `target` names: one worker by its id, or all workers of a pod, a host or a
    Ray node."""
    if not target:
        return ()
    named = [link for link in links if link.identity.worker_id == target]
    return named or [link for link in links if target in (link.identity.pod, link.identity.host, link.identity.node)]


def _worker(link: WorkerLink) -> pb.Worker:
    return pb.Worker(
        worker_id=link.identity.worker_id,
        incarnation=link.identity.incarnation,
        model=link.identity.model,
        node=link.identity.node,
        ray_cluster=link.identity.ray_cluster,
        state=worker_state(link),
        running=min(link.load.running, MAX_INT32),
        waiting=min(link.load.waiting, MAX_INT32),
        kv_usage=link.load.kv_usage,
        step_ms=link.load.step_s * 1000,
        max_num_seqs=link.info.max_num_seqs,
        engine_path=link.info.engine_path,
        engine_path_reason=link.info.engine_path_reason,
        engine_version=link.info.engine_version,
        engine_class=link.info.engine_class,
        free_sequences=min(link.free.sequences, MAX_INT32),
        kv_tokens=link.info.kv_tokens,
        pod=link.identity.pod,
        host=link.identity.host,
        gpu=link.identity.gpu,
        capabilities=link.info.capabilities,
    )


class NoLedger:
    """Stand-in for the Tenants, Keys, Usage and Audit services on a gateway without `auth`. Every method fails with
    UNSUPPORTED_FEATURE."""

    def __getattr__(self, name: str) -> object:
        return self._refuse

    @staticmethod
    def _refuse(request: Message, caller: AdminCaller) -> None:
        message = "this gateway has one tenant, no keys and no ledger: set auth in its configuration"
        raise CallError(Outcome.UNSUPPORTED_FEATURE, message)
