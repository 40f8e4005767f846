"""Tests of parts of the load-test scenario `observe`: a gateway without metrics, and a collector that drops the spans
that it gets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

from cluster.config.document import parse
from loadtests.scenarios.observe import OBSERVE_OFF, observe_on
from loadtests.serving import otlp_sink
from loadtests.serving.ours import configuration

WITHOUT = """
from loadtests.serving.gateway import turn_metrics_off
turn_metrics_off()
from cluster.observe.metrics import Metrics
metrics = Metrics("c")
metrics.count("hedges_total", "m", "won")
metrics.histogram("queue_time_seconds", "m").observe(1.0)
metrics.histogram("request_duration_seconds", "m").observe_traced(1.0, "a" * 32)
labels = {"headrace_cluster": "c", "model": "m", "outcome": "won"}
print(metrics.registry.get_sample_value("headrace_hedges_total", labels))
print(*metrics.histogram("request_duration_seconds", "m").counts, *metrics.histogram("queue_time_seconds", "m").counts)
"""


def test_the_arm_without_metrics_counts_nothing() -> None:
    """In a gateway without metrics, counters have no series and histograms stay empty."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300, check=True)
    counter, histograms = done.stdout.splitlines()
    assert counter == "None"
    assert set(histograms.split()) == {"0"}


async def test_the_collector_accepts_spans() -> None:
    """The collector answers an export of spans with an empty message, and refuses every other method."""
    sink = otlp_sink.create(0)
    sink.start()
    try:
        async with grpc.aio.insecure_channel(sink.address) as channel:
            message = pb.ExportTraceServiceRequest()
            message.resource_spans.add().scope_spans.add().spans.add().name = "chat"
            export: Any = pb_grpc.TraceServiceStub(channel).Export  # type: ignore[no-untyped-call]
            assert await export(message, timeout=60) == pb.ExportTraceServiceResponse()
            other: Any = channel.unary_unary("/other.Service/Method")
            assert await other(b"", timeout=60).code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await asyncio.to_thread(sink.stop)


def test_both_arms_have_valid_configurations(tmp_path: Path) -> None:
    """A gateway accepts both configurations: with metrics, traces and logs on, and with them off."""
    for section in (OBSERVE_OFF, observe_on(4317)):
        assert parse(configuration("m", tmp_path, observe=section)).observe.log_level in ("info", "error")
