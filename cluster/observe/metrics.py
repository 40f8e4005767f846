"""Names, labels, buckets and values of all metrics. Values are plain dicts and lists until a scrape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

# The buckets of vLLM 0.32, so that one panel can show vLLM's histograms and these.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class _Definition:
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


DEFINITIONS: Mapping[str, _Definition] = {
    "requests_total": _Definition("counter", "Calls ended, by outcome.", ("model", "tenant", "api", "outcome")),
    "auth_failures_total": _Definition("counter", "Requests rejected for want of valid credentials.", ("reason",)),
    "guard_actions_total": _Definition(
        "counter",
        "Actions of guards, by guard (input_patterns, ...): redacted, refused, flagged, failed_closed, failed_open.",
        ("tenant", "reason", "outcome"),
    ),
    "rejected_total": _Definition("counter", "Calls refused before a worker accepted them.", ("model", "reason")),
    "prompt_tokens_total": _Definition(
        "counter", "Prompt tokens of calls, by the engine's count.", ("model", "tenant")
    ),
    "cached_tokens_total": _Definition("counter", "Prompt tokens from the prefix cache.", ("model", "tenant")),
    "generation_tokens_total": _Definition("counter", "Tokens delivered to callers.", ("model", "tenant")),
    "reasoning_tokens_total": _Definition(
        "counter", "Reasoning tokens, a part of the tokens delivered to callers.", ("model", "tenant")
    ),
    "tenant_service_tokens_total": _Definition(
        "counter", "Weighted tokens charged for ended calls.", ("model", "tenant")
    ),
    "scaling_decisions_total": _Definition(
        "counter",
        "Scaling decisions of the controller, by outcome: hold, up, down, to_zero, from_zero, move.",
        ("model", "outcome"),
    ),
    "gpu_seconds_total": _Definition("counter", "GPU-seconds held by a model's replicas.", ("model",)),
    "route_decisions_total": _Definition("counter", "Calls bound to a worker, by reason.", ("model", "reason")),
    "prefix_predicted_tokens_total": _Definition(
        "counter",
        "Prompt tokens that were expected in the worker's prefix cache, by kind of prediction: exact, approximate.",
        ("model", "state"),
    ),
    "prefix_mispredicted_tokens_total": _Definition(
        "counter",
        "Differences between expected and found cached tokens, over calls with a prediction, by its kind.",
        ("model", "state"),
    ),
    "resumes_total": _Definition("counter", "Sequences resumed on another worker, by reason.", ("model", "reason")),
    "resume_gap_seconds": _Definition(
        "histogram",
        "A caller's wait between one worker's last token and the next worker's first token.",
        ("model",),
        TTFT_BUCKETS,
    ),
    "hedges_total": _Definition(
        "counter",
        "Calls sent to a second worker, by outcome: won (the second worker kept the call) or lost.",
        ("model", "outcome"),
    ),
    "wasted_tokens_total": _Definition(
        "counter",
        "Prompt tokens that a worker was expected to compute in vain, by reason: hedge. An upper bound.",
        ("model", "reason"),
    ),
    "worker_detected_total": _Definition("counter", "Worker links that ended, by cause.", ("model", "reason")),
    "request_duration_seconds": _Definition("histogram", "Duration of a call.", ("model",), REQUEST_BUCKETS),
    "time_to_first_token_seconds": _Definition(
        "histogram", "Time from arrival to first token.", ("model",), TTFT_BUCKETS
    ),
    "inter_token_latency_seconds": _Definition("histogram", "Time between tokens of a call.", ("model",), ITL_BUCKETS),
    "queue_time_seconds": _Definition("histogram", "Waiting time in the gateway.", ("model",), REQUEST_BUCKETS),
    "event_loop_lag_seconds": _Definition("histogram", "Delay of the event loop's wake-ups.", (), LAG_BUCKETS),
    "requests_in_flight": _Definition("gauge", "Calls in progress.", ("model",)),
    "queue_requests": _Definition("gauge", "Sequences waiting in the gateway.", ("model",)),
    "queue_tokens": _Definition("gauge", "Prompt tokens waiting in the gateway.", ("model",)),
    "fairness_gap_ratio": _Definition(
        "gauge", "Largest difference in service between two waiting tenants, in U of docs/tenancy.md.", ("model",)
    ),
    "limit_utilization_ratio": _Definition(
        "gauge", "Used part of a limit at its tenant's last call, if within a minute.", ("tenant", "limit")
    ),
    "budget_used_ratio": _Definition(
        "gauge", "Used part of a tenant's budget of this day or month, from the ledger.", ("tenant", "limit")
    ),
    "budget_webhook_total": _Definition("counter", "Budget notices sent, by outcome.", ("outcome",)),
    "prompt_log_lost_total": _Definition("counter", "Calls that could not be written to the prompt log.", ()),
    "limits_degraded": _Definition("gauge", "1 while the store of shared limits is unavailable.", ()),
    "worker_up": _Definition("gauge", "1 while a worker's link is up.", ("model", "worker")),
    "worker_info": _Definition(
        "gauge",
        "Always 1: a worker's pod, its node (outside Kubernetes its host), and its type of GPU.",
        ("worker", "pod", "node", "gpu"),
    ),
    "worker_running_requests": _Definition("gauge", "Requests running in the engine.", ("model", "worker")),
    "worker_waiting_requests": _Definition("gauge", "Requests in the engine's own queue.", ("model", "worker")),
    "worker_kv_usage_ratio": _Definition("gauge", "Share of KV blocks in use.", ("model", "worker")),
    "worker_step_seconds": _Definition("gauge", "Length of the engine's last step.", ("model", "worker")),
    "link_connected": _Definition("gauge", "Links that are up, by dialing process: worker or controller.", ("api",)),
    "model_replicas": _Definition("gauge", "Workers linked to this gateway.", ("model",)),
    "model_replicas_desired": _Definition("gauge", "Replica target of the controller.", ("model",)),
    "model_state": _Definition("gauge", "1 for the model's current state.", ("model", "state")),
    "adapters": _Definition("gauge", "Adapters by their state on this gateway's workers.", ("model", "state")),
    "spans_total": _Definition(
        "counter",
        "Spans of sampled calls, by outcome: exported; dropped (the queue to the collector was full); failed (the "
        "collector was away or refused them).",
        ("outcome",),
    ),
    "config_valid": _Definition(
        "gauge", "1 while the configuration file is valid; 0 if a restart would refuse a part of it.", ()
    ),
    "catalog_age_seconds": _Definition("gauge", "Time since the controller's last message; -1 if there was none.", ()),
    "ledger_pending_records": _Definition("gauge", "Usage records that are not in the database yet.", ()),
    "ledger_lag_seconds": _Definition("gauge", "Age of the oldest usage record that is not in the database.", ()),
    "build_info": _Definition("gauge", "Always 1.", ("version", "python", "grpc")),
    "engine_path_info": _Definition(
        "gauge", "Always 1: the path by which a worker calls its engine, and the reason.", ("worker", "path", "reason")
    ),
}

OTHER = "other"
_TENANT_AT = {name: d.labels.index("tenant") for name, d in DEFINITIONS.items() if "tenant" in d.labels}


class Histogram:
    """A histogram series: the counts by bucket, and the sum of the values."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value `times` times. The call takes about 0.3 µs."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count) for each bucket, in the form that Prometheus expects."""
        out, running = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), list(self.counts), strict=True):
            running += count
            out.append((bound, float(running)))
        return out


Sample = tuple[str, tuple[str, ...], float]
"""A gauge's value at a scrape: the metric's name, the label values in the order of the definition, and the value."""


class Metrics(Collector):
    """All metrics of one process. Its methods take names without the prefix `headrace_`."""

    def __init__(self, cluster: str, max_tenants: int = 500) -> None:
        """`max_tenants`: greatest number of tenants with counters of their own; the others share the tenant `other`."""
        self._cluster = cluster
        self._max_tenants = max_tenants
        self._tenants: set[str] = set()
        self._counters: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        self._gauges: list[Callable[[], Iterable[Sample]]] = []
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add `by` to a counter. `labels`: the label values, in the order of DEFINITIONS."""
        at = _TENANT_AT.get(name)
        if at is not None and labels[at] not in self._tenants:
            if len(self._tenants) < self._max_tenants:
                self._tenants.add(labels[at])
            else:
                labels = (*labels[:at], OTHER, *labels[at + 1 :])
        series = self._counters.setdefault(name, {})
        series[labels] = series.get(labels, 0) + by

    def histogram(self, name: str, *labels: str) -> Histogram:
        """Return the histogram series with these label values, which is created if needed. Callers that use the series
        often should keep the returned object."""
        series = self._histograms.setdefault(name, {})
        if labels not in series:
            series[labels] = Histogram(DEFINITIONS[name].buckets)
        return series[labels]

    def add_gauges(self, gauges: Callable[[], Iterable[Sample]]) -> None:
        """Register a function that returns gauge values. It runs in the scraping thread and must only read."""
        self._gauges.append(gauges)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics for prometheus_client."""
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for gauges in self._gauges:
            for name, labels, value in gauges():
                samples.setdefault(name, []).append((labels, value))
        for name, definition in DEFINITIONS.items():
            full, labels = f"headrace_{name}", ("headrace_cluster", *definition.labels)
            if definition.kind == "counter":
                counter = CounterMetricFamily(full.removesuffix("_total"), definition.help, labels=labels)
                for values, total in list(self._counters.get(name, {}).items()):
                    counter.add_metric((self._cluster, *values), total)
                yield counter
            elif definition.kind == "histogram":
                histogram = HistogramMetricFamily(full, definition.help, labels=labels)
                for values, series in list(self._histograms.get(name, {}).items()):
                    histogram.add_metric((self._cluster, *values), buckets=series.buckets(), sum_value=series.sum)
                yield histogram
            else:
                gauge = GaugeMetricFamily(full, definition.help, labels=labels)
                for values, value in samples.get(name, ()):
                    gauge.add_metric((self._cluster, *values), value)
                yield gauge

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Return the content type and the body of /metrics. `accept`: the scraper's Accept header. Thread-safe."""
        encode, kind = choose_encoder(accept)
        return kind, encode(self.registry)
