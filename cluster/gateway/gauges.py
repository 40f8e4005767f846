"""The gauges of a gateway, which each scrape of the metrics page reads."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from cluster import __version__
from cluster.api.adapters import AdapterState
from cluster.api.types import ModelState
from cluster.gateway.call_service import CallService
from cluster.gateway.config_state import ConfigState
from cluster.gateway.links.hub import Hub
from cluster.gateway.links.starting_workers import StartingWorker
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.quotas.local_limits import LimitsPort
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.observe import log
from cluster.observe.metrics import Sample
from cluster.wire.certificate_expiry import CertificateExpiry

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting


QUARANTINED = "quarantined"
"""State of a quarantined version in the metrics. All other versions have a state of ModelState."""


@dataclass(frozen=True, slots=True)
class GatewayGauges:
    """Gauges of a gateway, computed from the state of its parts. A scrape runs in a thread, so it must only read the
    state."""

    hub: Hub
    directory: ModelDirectory
    scheduler: Scheduler
    service: CallService
    limits: LimitsPort
    reservations: QuotaReservations
    accounting: Accounting | None
    config_state: ConfigState
    certificates: CertificateExpiry

    def samples(self) -> Iterator[Sample]:
        """Yield the current value of each gauge."""
        yield "build_info", (__version__, platform.python_version(), grpc.__version__), 1
        yield "config_valid", (), float(self.config_state.valid)
        statistics, heard = self.hub.statistics(), self.hub.controller.heard_at
        yield "log_lines_dropped_total", (), log.dropped_lines()
        for file, expires_at_s in self.certificates.current():
            yield "certificate_expiry_timestamp_seconds", (str(file),), expires_at_s
        yield "link_connected", ("worker",), statistics.workers
        yield "link_connected", ("controller",), statistics.controllers
        yield "catalog_age_seconds", (), -1 if heard is None else time.monotonic() - heard
        if self.accounting is not None:
            ledger = self.accounting.statistics()
            lag_s = 0 if ledger.oldest_at_s is None else max(time.time() - ledger.oldest_at_s, 0)
            yield "ledger_pending_records", (), ledger.pending
            yield "ledger_lag_seconds", (), lag_s
            yield "usage_record_conflicts_total", (), self.accounting.conflicts
            for kind, count in list(self.accounting.refused.items()):
                yield "usage_reports_refused_total", (kind,), count
        yield "limits_degraded", (), float(self.limits.degraded)
        for tenant, limit, ratio in self.reservations.utilization():
            yield "limit_utilization_ratio", (tenant, limit), ratio
        yield from self._models()
        links = self.hub.links
        for link in links:
            yield from _worker(link)
        linked = {link.identity.worker_id for link in links}
        for worker in self.hub.starting.current:
            if worker.worker_id not in linked:
                yield from _starting(worker)

    def _models(self) -> Iterator[Sample]:
        spreads = self.scheduler.charges.statistics.spreads
        running = self.service.statistics()
        for model in self.directory.models:
            labels = (model.name,)
            waiting, tokens = self.scheduler.queues.waiting(model.name)
            chats, guessed = self.scheduler.renders.waiting(model.name)
            yield "fairness_gap_ratio", labels, spreads.get(model.name, 0.0) / fairness_unit(model)
            yield "requests_in_flight", labels, running.get(model.name, 0)
            yield "queue_requests", labels, waiting + chats
            yield "queue_tokens", labels, tokens + guessed
            yield "model_replicas", labels, len(model.links)
            yield "model_replicas_desired", labels, model.entry.replicas_desired
            yield from _versions(model)
            for state in ModelState:
                yield "model_state", (model.name, state.value.lower()), float(model.state is state)
            if model.entry.slo_ttft_s:
                yield "model_slo_ttft_seconds", labels, model.entry.slo_ttft_s
            if model.entry.slo_itl_s:
                yield "model_slo_itl_seconds", labels, model.entry.slo_itl_s
            adapters = Counter(model.adapters.view(spec.name).state for spec in model.adapters.specs)
            for each in AdapterState:
                yield "adapters", (model.name, each.value.lower()), adapters[each]


def _versions(model: KnownModel) -> Iterator[Sample]:
    workers = Counter(link.identity.version for link in list(model.links.values()))
    for version in {share.version for share in model.entry.versions} | workers.keys():
        yield "model_version_workers", (model.name, version), workers[version]
    for share in model.entry.versions:
        labels = (model.name, share.version)
        yield "model_version_weight_ratio", labels, 0 if share.quarantined else share.weight
        state = QUARANTINED if share.quarantined else share.state.value.lower()
        for each in (*(state.value.lower() for state in ModelState), QUARANTINED):
            yield "model_version_state", (*labels, each), float(each == state)


def _worker(link: WorkerLink) -> Iterator[Sample]:
    identity, info, load = link.identity, link.info, link.load
    labels = (identity.model, identity.worker_id)
    yield "worker_up", labels, 1
    yield "worker_info", (identity.worker_id, identity.pod, identity.host or identity.node, identity.gpu), 1
    yield "worker_running_requests", labels, load.running
    yield "worker_waiting_requests", labels, load.waiting
    yield "worker_kv_usage_ratio", labels, load.kv_usage
    yield "worker_step_seconds", labels, load.step_s
    yield "vllm:num_requests_running", labels, load.running
    yield "vllm:num_requests_waiting", labels, load.waiting
    yield "vllm:kv_cache_usage_perc", labels, load.kv_usage
    work = link.work
    yield "vllm:num_preemptions_total", labels, work.preemptions
    yield "vllm:prefix_cache_queries_total", labels, work.prefix_query_tokens
    yield "vllm:prefix_cache_hits_total", labels, work.prefix_hit_tokens
    yield "vllm:prompt_tokens_total", labels, work.prefill_tokens + work.prefix_hit_tokens
    yield "vllm:generation_tokens_total", labels, work.decode_tokens
    yield "engine_path_info", (identity.worker_id, info.engine_path, info.engine_path_reason), 1


def _starting(worker: StartingWorker) -> Iterator[Sample]:
    labels = (worker.model, worker.worker_id)
    yield "worker_info", (worker.worker_id, worker.pod, worker.node, worker.gpu), 1
    yield "weights_fetched_bytes", labels, worker.fetched_bytes
    yield "weights_total_bytes", labels, worker.total_bytes
    yield "weights_fetch_bytes_per_second", labels, worker.bytes_per_s


def fairness_unit(model: KnownModel) -> float:
    """Return the fairness unit U of docs/tenancy.md, in weighted tokens. U is the larger of two costs: the cost of the
    longest prompt, and the cost of outputs that fill one worker's KV cache. A prompt token counts 1, an output token
    2."""
    kv_tokens = max((link.info.kv_tokens for link in model.links.values()), default=0)
    return max(2.0 * kv_tokens, float(model.capabilities.max_model_len), 1.0)
