"""The values of all metrics, and the /metrics page. The values are plain dicts and lists until a scrape.

definitions.py has the names of the metrics.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from cluster.observe.definitions import DEFINITIONS, ENGINE_DEFINITIONS, ENGINE_HISTOGRAMS, Definition

OTHER = "other"
OPEN_METRICS = "application/openmetrics-text"
_TENANT_AT = {name: d.labels.index("tenant") for name, d in DEFINITIONS.items() if "tenant" in d.labels}


class Histogram:
    """A histogram series: the sum of the values, and for each bucket the count and the last value with a trace id."""

    __slots__ = ("_bounds", "_exemplars", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._exemplars: dict[int, tuple[str, float, float]] = {}
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value `times` times. The call takes about 0.3 µs."""
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def observe_traced(self, value: float, trace_id: str) -> None:
        """Count a value of a call. `trace_id`: the id of the call's trace, which the bucket then shows as its exemplar;
        "" for no exemplar."""
        self.observe(value)
        if trace_id:
            self._exemplars[bisect_left(self._bounds, value)] = (trace_id, value, time.time())

    def buckets(self) -> list[Any]:
        """Return (upper bound, cumulative count) for each bucket, and a third item if the bucket has an exemplar. This
        is the form that prometheus_client expects."""
        out: list[Any] = []
        running, exemplars = 0, dict(self._exemplars)
        for at, (bound, count) in enumerate(zip((*map(str, self._bounds), "+Inf"), list(self.counts), strict=True)):
            running += count
            if (exemplar := exemplars.get(at)) is None:
                out.append((bound, float(running)))
            else:
                trace_id, value, when_s = exemplar
                out.append((bound, float(running), Exemplar({"trace_id": trace_id}, value, when_s)))
        return out


Sample = tuple[str, tuple[str, ...], float]
"""A gauge's or counter's value at a scrape: the metric's name, the label values in the order of the definition, and the
value."""
MAX_CAPPED = 100_000
"""Maximum value of the metric `tenants_capped`, the number of tenants without series of their own."""


class Metrics(Collector):
    """All metrics of one process. Its methods take names without the prefix `headrace_`."""

    def __init__(self, cluster: str, max_tenants: int = 500) -> None:
        """`max_tenants`: greatest number of tenants that have series of their own. All further tenants share the label
        `other`."""
        self._cluster = cluster
        self._max_tenants = max_tenants
        self._tenants: set[str] = set()
        self._capped: set[str] = set()
        self._counters: dict[str, dict[tuple[str, ...], float]] = {}
        self._histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        self._gauges: list[Callable[[], Iterable[Sample]]] = []
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        self.add_gauges(lambda: [("tenants_capped", (), len(self._capped))])

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add `by` to a counter. `labels`: the label values, in the order of DEFINITIONS."""
        series = self._counters.get(name)
        if series is None:
            series = self._counters[name] = {}
        value = series.get(labels)
        if value is None:
            at = _TENANT_AT.get(name)
            if at is not None:
                labels = (*labels[:at], self._tenant_label(labels[at]), *labels[at + 1 :])
            value = series.get(labels, 0)
        series[labels] = value + by

    def _tenant_label(self, tenant: str) -> str:
        """Return the value of the label `tenant`: the tenant's name, or `other` if `max_tenants` other tenants already
        have labels of their own."""
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) < self._max_tenants:
            self._tenants.add(tenant)
            return tenant
        if len(self._capped) < MAX_CAPPED:
            self._capped.add(tenant)
        return OTHER

    def _capped_gauges(
        self, samples: Iterable[tuple[tuple[str, ...], float]], at: int
    ) -> list[tuple[tuple[str, ...], float]]:
        """Return a gauge's samples with at most `max_tenants` tenants as labels. All other tenants share the sample
        `other`, which has the largest of their values. `at`: index of the tenant in the labels."""
        largest: dict[tuple[str, ...], float] = {}
        for labels, value in samples:
            labels = (*labels[:at], self._tenant_label(labels[at]), *labels[at + 1 :])
            largest[labels] = max(value, largest.get(labels, value))
        return list(largest.items())

    def histogram(self, name: str, *labels: str) -> Histogram:
        """Return the histogram series with these label values, and create it if needed. Callers that use a series often
        should keep the returned object."""
        series = self._histograms.setdefault(name, {})
        if labels not in series:
            series[labels] = Histogram(DEFINITIONS[name].buckets)
        return series[labels]

    def histogram_counts(self, name: str, *labels: str) -> tuple[int, ...]:
        """Return the count of each bucket of a histogram series; empty if the series has no value yet."""
        series = self._histograms.get(name, {}).get(labels)
        return () if series is None else tuple(series.counts)

    def counts(self, name: str) -> Sequence[tuple[tuple[str, ...], float]]:
        """Return the series of a counter: label values, in the order of DEFINITIONS, and the value."""
        return list(self._counters.get(name, {}).items())

    def add_gauges(self, gauges: Callable[[], Iterable[Sample]]) -> None:
        """Register a function that returns values of gauges and counters. The function runs in the scraping thread and
        must change nothing."""
        self._gauges.append(gauges)

    def remove_gauges(self, gauges: Callable[[], Iterable[Sample]]) -> None:
        """Remove a function that `add_gauges` has registered."""
        self._gauges = [other for other in self._gauges if other is not gauges]

    def add_process_metrics(self) -> None:
        """Export this process's memory, CPU time, file descriptors, start time and garbage collections, under
        Prometheus' usual names (process_*, python_gc_*)."""
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics for prometheus_client."""
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {}
        for gauges in self._gauges:
            for name, labels, value in gauges():
                samples.setdefault(name, []).append((labels, value))
        for name, at in _TENANT_AT.items():
            if name in samples:
                samples[name] = self._capped_gauges(samples[name], at)
        for name, definition in DEFINITIONS.items():
            yield self._family(name, f"headrace_{name}", definition, samples.get(name, ()))
        for name, definition in ENGINE_DEFINITIONS.items():
            yield self._family(name, name, definition, samples.get(name, ()))
        for alias, name in ENGINE_HISTOGRAMS.items():
            ours = DEFINITIONS[name]
            yield self._family(name, alias, Definition("histogram", ours.help, ("model_name",), ours.buckets), ())

    def _family(
        self, name: str, full: str, definition: Definition, samples: Iterable[tuple[tuple[str, ...], float]]
    ) -> Metric:
        """Return all series of a metric. `name`: the metric's name without `headrace_`. `full`: its name on the
        /metrics page."""
        labels = ("headrace_cluster", *definition.labels)
        if definition.kind == "histogram":
            histogram = HistogramMetricFamily(full, definition.help, labels=labels)
            for values, series in list(self._histograms.get(name, {}).items()):
                histogram.add_metric((self._cluster, *values), buckets=series.buckets(), sum_value=series.sum)
            return histogram
        family: CounterMetricFamily | GaugeMetricFamily
        if definition.kind == "counter":
            family = CounterMetricFamily(full.removesuffix("_total"), definition.help, labels=labels)
        else:
            family = GaugeMetricFamily(full, definition.help, labels=labels)
        for values, value in (*list(self._counters.get(name, {}).items()), *samples):
            family.add_metric((self._cluster, *values), value)
        return family

    def render(self, accept: str = "") -> tuple[str, bytes]:
        """Return the content type and the body of /metrics. `accept`: the scraper's Accept header. Thread-safe."""
        if OPEN_METRICS not in accept:
            return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.registry)
        # All names are valid without escaping; other escaping schemes would replace colons (prometheus_client 0.26).
        return openmetrics.CONTENT_TYPE_LATEST, openmetrics.generate_latest(self.registry, escaping=ALLOWUTF8)  # type: ignore[no-untyped-call]
