"""A collector of spans for tests: a real OTLP receiver over gRPC that keeps all spans."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.support.cluster import until


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a collector gets it. Times are seconds since the epoch."""

    span: trace_pb2.Span
    resource: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the span."""
        return str(self.span.name)

    @property
    def id(self) -> str:
        """Id of the span."""
        return str(self.span.span_id.hex())

    @property
    def parent(self) -> str:
        """Id of the parent; "" without one."""
        return str(self.span.parent_span_id.hex())

    @property
    def trace(self) -> str:
        """Id of the trace."""
        return str(self.span.trace_id.hex())

    @property
    def start_s(self) -> float:
        """Time of the beginning."""
        return float(self.span.start_time_unix_nano) / 1e9

    @property
    def end_s(self) -> float:
        """Time of the end."""
        return float(self.span.end_time_unix_nano) / 1e9

    @property
    def links(self) -> list[str]:
        """Ids of the linked spans."""
        return [link.span_id.hex() for link in self.span.links]

    @property
    def is_error(self) -> bool:
        """Whether the span has failed."""
        return bool(self.span.status.code == trace_pb2.Status.STATUS_CODE_ERROR)

    def __getitem__(self, name: str) -> Any:
        return _values(self.span.attributes)[name]

    def get(self, name: str) -> Any:
        """Return an attribute; None if the span does not have it."""
        return _values(self.span.attributes).get(name)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """All attributes of the span, by name."""
        return _values(self.span.attributes)


@dataclass
class Collector:
    """A running receiver. `refusal`: status code with which it refuses all spans; None to accept them."""

    endpoint: str
    spans: list[ReceivedSpan] = field(default_factory=list)
    metadata: list[Mapping[str, str]] = field(default_factory=list)
    refusal: grpc.StatusCode | None = None

    def of_trace(self, trace_id: str) -> list[ReceivedSpan]:
        """Return the spans of a trace, ordered by start time."""
        return sorted((span for span in self.spans if span.trace == trace_id), key=lambda span: span.start_s)

    def roots(self) -> list[ReceivedSpan]:
        """Return the root spans of calls, which have the kind SERVER."""
        return [span for span in self.spans if span.span.kind == trace_pb2.Span.SPAN_KIND_SERVER]

    async def until_calls(self, calls: int) -> list[ReceivedSpan]:
        """Wait until the collector has the root spans of at least `calls` calls, and return these spans."""
        await until(lambda: len(self.roots()) >= calls, f"the collector has {calls} calls")
        return self.roots()


class _Service(pb_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    async def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        self._collector.metadata.append({key: str(value) for key, value in context.invocation_metadata()})
        if self._collector.refusal is not None:
            await context.abort(self._collector.refusal, "the test's collector refuses everything")
        self._collector.spans += _received(request)
        return pb.ExportTraceServiceResponse()


def _received(request: pb.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for block in request.resource_spans:
        resource = _values(block.resource.attributes)
        for scope in block.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(span, resource)


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@asynccontextmanager
async def running_collector(credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[Collector]:
    """Run a collector on loopback, with TLS if there are `credentials`."""
    collector = Collector("")
    server = grpc.aio.server()
    add_service: Any = pb_grpc.add_TraceServiceServicer_to_server
    add_service(_Service(collector), server)
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    collector.endpoint = f"{'https://localhost' if credentials else 'http://127.0.0.1'}:{port}"
    await server.start()
    try:
        yield collector
    finally:
        await asyncio.shield(server.stop(0))
