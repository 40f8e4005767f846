"""The number of series is bounded for any number of tenants, and each bucket of a histogram keeps the trace of its last
value.
"""

from __future__ import annotations

import subprocess
import sys

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.observe.metrics import Histogram, Metrics

TRACE_A, TRACE_B = "a" * 32, "b" * 32

MANY_TENANTS = """
import resource, sys
from cluster.observe.metrics import Metrics
from cluster.observe.definitions import DEFINITIONS
metrics = Metrics("c", max_tenants=500)
with_tenant = {name: d.labels for name, d in DEFINITIONS.items() if d.kind == "counter" and "tenant" in d.labels}
for number in range(30_000):
    tenant = f"tenant-{number % int(sys.argv[1])}"
    name, labels = list(with_tenant.items())[number % len(with_tenant)]
    metrics.count(name, *(tenant if label == "tenant" else label for label in labels))
    if number % len(with_tenant) == 0:
        for name, labels in with_tenant.items():
            metrics.count(name, *(tenant if label == "tenant" else label for label in labels))
page = metrics.render()[1].decode()
tenants = {part for line in page.splitlines() for part in line.split('"') if part.startswith("tenant-")}
capped = metrics.registry.get_sample_value("headrace_tenants_capped", {"headrace_cluster": "c"})
print(len(tenants), 'tenant="other"' in page, int(capped))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def run(tenants: int) -> tuple[str, float]:
    """Run a process that counts calls of `tenants` tenants. Return the line that it prints about its metric series, and
    its peak memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", MANY_TENANTS, str(tenants)], capture_output=True, text=True, timeout=300, check=True
    )
    series, memory_mb = done.stdout.splitlines()
    return series, float(memory_mb)


def test_ten_thousand_tenants_fit_into_the_cap() -> None:
    """Of 10,000 tenants, 500 have series of their own. The other tenants share one series, and their number is
    reported. The process needs at most 100 MB more memory than with 10 tenants."""
    few, few_mb = run(10)
    many, many_mb = run(10_000)
    assert few == "10 False 0"
    assert many == "500 True 9500"
    assert many_mb - few_mb <= 100


def page_of(metrics: Metrics) -> list[Sample]:
    """Return the samples of the /metrics page in the OpenMetrics format."""
    text = metrics.render("application/openmetrics-text")[1].decode()
    families = text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return [sample for family in families for sample in family.samples]


def test_a_bucket_has_the_last_traced_value() -> None:
    """The exemplar of a histogram bucket is the last value that belongs to a trace. Values without a trace are counted,
    but are not exemplars. Prometheus' plain text format has no exemplars."""
    metrics = Metrics("c")
    ttft = metrics.histogram("time_to_first_token_seconds", "m")
    for value, trace in ((0.03, TRACE_A), (0.031, TRACE_B), (0.032, ""), (1000.0, TRACE_A), (5000.0, "")):
        ttft.observe_traced(value, trace)
    found = {
        sample.labels["le"]: (sample.exemplar.labels["trace_id"], sample.exemplar.value)
        for sample in page_of(metrics)
        if sample.name == "headrace_time_to_first_token_seconds_bucket" and sample.exemplar
    }
    assert found == {"0.04": (TRACE_B, 0.031), "2560.0": (TRACE_A, 1000.0)}
    assert b"trace_id" not in metrics.render()[1]
    assert ttft.buckets()[-1] == ("+Inf", 5.0)


def test_traces_change_no_count() -> None:
    """A histogram counts a value in the same way with and without a trace."""
    plain, traced = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        plain.observe(value)
        traced.observe_traced(value, TRACE_A)
    assert (plain.counts, plain.sum) == (traced.counts, traced.sum)
    assert [bucket[:2] for bucket in traced.buckets()] == plain.buckets()


def test_gauge_functions_may_return_counters() -> None:
    """A function passed to `add_gauges` may also return counters and metrics with vLLM's names. Counters are exported
    as counters; vLLM's names get no prefix."""
    metrics = Metrics("c")
    metrics.add_gauges(lambda: [("log_lines_dropped_total", (), 3), ("vllm:num_preemptions_total", ("m", "w"), 2)])
    found = {sample.name: sample.value for sample in page_of(metrics)}
    assert found["headrace_log_lines_dropped_total"] == 3
    assert found["vllm:num_preemptions_total"] == 2


def test_gauges_of_tenants_keep_to_the_same_cap() -> None:
    """The tenants that have series of counters also have series of gauges, and no other tenants have any.

    The other tenants share one series with the label `other`. Its gauge has the largest of their values.
    """
    metrics = Metrics("c", max_tenants=2)
    metrics.count("generation_tokens_total", "m", "a")
    metrics.count("generation_tokens_total", "m", "b")
    uses = {"a": 0.1, "c": 0.9, "b": 0.2, "d": 0.4}
    metrics.add_gauges(lambda: [("budget_used_ratio", (tenant, "day"), use) for tenant, use in uses.items()])
    found = {s.labels["tenant"]: s.value for s in page_of(metrics) if s.name == "headrace_budget_used_ratio"}
    assert found == {"a": 0.1, "b": 0.2, "other": 0.9}
    assert {s.labels["tenant"] for s in page_of(metrics) if "tenant" in s.labels} == {"a", "b", "other"}
