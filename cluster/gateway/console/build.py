"""Construction of the console's parts from the parts of a gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster import __version__
from cluster.api.outcomes import CallError
from cluster.config.schema import Config
from cluster.gateway.apis.admin.siblings import CONSOLE, Siblings
from cluster.gateway.call_service import CallService
from cluster.gateway.console.overview.live import LiveOverview, Names
from cluster.gateway.console.overview.lost_workers import LostWorkers
from cluster.gateway.console.overview.parts import PartMaker
from cluster.gateway.console.overview.recent_calls import RecentCalls
from cluster.gateway.console.overview.scaling_reasons import ScalingReasons
from cluster.gateway.console.overview.survey import GatewayParts
from cluster.gateway.console.peers.peer_answers import PeerAnswers
from cluster.gateway.console.peers.peers import NO_PEERS, FirstConnected, Peers
from cluster.gateway.links.hub import Hub
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.observe.metrics import Metrics
from cluster.policy.limits.budgets import BudgetUse
from cluster.policy.problems import Problem
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.usage.accounting import Accounting
    from cluster.ledger.usage.records import UsageRecord


@dataclass(frozen=True, slots=True)
class Sources:
    """The parts of a gateway that the console reads."""

    config: Config
    process: int
    hub: Hub
    events: WorkerEvents
    directory: ModelDirectory
    scheduler: Scheduler
    service: CallService
    metrics: Metrics
    tenants: TenantAuthenticator | None
    accounting: Accounting | None
    utilization: Callable[[], Iterator[tuple[str, str, float]]]
    budgets: Callable[[], Sequence[BudgetUse]]
    problems: Callable[[], Sequence[Problem]]
    siblings: Siblings | None = None
    """The other processes of this host, if any."""


def live_overview(sources: Sources) -> LiveOverview:
    """Return the live overview of a gateway. From now on, ended calls and lost workers are recorded for the
    overview."""
    service, hub, config = sources.service, sources.hub, sources.config
    recent, lost = RecentCalls(service.clock), LostWorkers()
    service.call_at_end(recent.record)
    sources.events.observers.append(lost)
    sources.scheduler.routes.on_resent = lost.resent
    if sources.accounting is not None and config.cost is not None:
        sources.accounting.on_record = _charger(recent, config.cost.gpu_hour)
    tenants = sources.tenants
    parts = GatewayParts(
        hub,
        sources.directory,
        sources.scheduler,
        service,
        sources.metrics,
        recent,
        lost,
        sources.utilization,
        dict if tenants is None else lambda: _policies(tenants),
        sources.budgets,
        sources.problems,
    )
    console = config.gateway.console
    live = LiveOverview(
        parts,
        PartMaker(hub.gateway_id, sources.process, hub.incarnation, recent),
        ScalingReasons(hub.controller.ask),
        Names(config.name, __version__, has_cost=config.cost is not None),
        lambda tenant: _models_of(tenant, sources.directory, tenants),
        has_history=console.enabled and console.history,
    )
    service.calls.on_close.add(live.close)
    live.peers = _peers(sources, PeerAnswers(live))
    return live


def _peers(sources: Sources, answer: PeerAnswers) -> Peers:
    """Return the object that reaches the other gateway processes: the processes of all hosts if the gateways share a
    store, else the processes of this host."""
    of_host: Peers = NO_PEERS
    if sources.siblings is not None:
        from cluster.gateway.console.peers.sibling_peers import SiblingPeers, sibling_answer

        sources.siblings.answer(CONSOLE, sibling_answer(answer))
        of_host = SiblingPeers(sources.siblings)
    if not (url := sources.config.store.limits_url):
        return of_host
    from cluster.gateway.console.peers.valkey_peers import ValkeyPeers

    of_all = ValkeyPeers(url, sources.hub.gateway_id, answer)
    return FirstConnected(of_all, of_all.connected.is_set, of_host)


def _charger(recent: RecentCalls, gpu_hour: Mapping[str, float]) -> Callable[[UsageRecord], None]:
    def charge(record: UsageRecord) -> None:
        """Add the cost of a usage record to the sums over ended calls. The record costs nothing if its accelerator has
        no price."""
        if rate := gpu_hour.get(record.gpu):
            recent.charge(record.tenant, record.model, record.gpu_seconds * rate / 3600)

    return charge


def _policies(tenants: TenantAuthenticator) -> Mapping[str, TenantPolicy]:
    try:
        return tenants.policies()
    except CallError:  # the snapshot is too old; only tenants with calls are shown then
        return {}


def _models_of(
    tenant: str, directory: ModelDirectory, tenants: TenantAuthenticator | None
) -> Mapping[str, Sequence[str]]:
    """Return the models that a tenant may use, each with those aliases that the tenant may use."""
    if tenants is None:
        return {model.name: model.entry.aliases for model in directory.models}
    try:
        entry = tenants.snapshot().tenants.get(tenant)
    except CallError:
        return {}
    if entry is None:
        return {}
    principal = Principal(entry.policy, model_aliases=entry.model_aliases)
    return {model.name: directory.lookup.aliases(model, principal) for model in directory.lookup.models_of(principal)}
