"""A small receiver of spans by OTLP over gRPC, for `headrace traces` and `headrace up --traces`. It stores nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from cluster.observe.spans import SpanEvent, SpanKind, SpanRecord, Value

_KINDS = {trace_pb2.Span.SPAN_KIND_SERVER: SpanKind.SERVER, trace_pb2.Span.SPAN_KIND_CLIENT: SpanKind.CLIENT}


class OtlpReceiver(pb_grpc.TraceServiceServicer):
    """Receives spans. Calls a function with the spans of each received message, in a thread."""

    def __init__(self, listen: str, receive: Callable[[Sequence[SpanRecord]], None]) -> None:
        """`listen`: host:port; port 0 picks a free port. Raises RuntimeError if the address cannot be bound."""
        self._receive = receive
        self._server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
        add_service: Any = pb_grpc.add_TraceServiceServicer_to_server
        add_service(self, self._server)
        port = self._server.add_insecure_port(listen)
        if not port:
            raise RuntimeError(f"{listen} cannot be bound: another process listens there, or this host has no such IP")
        self.address = f"{listen.rpartition(':')[0]}:{port}"
        """Bound address."""

    def start(self) -> None:
        """Begin to accept spans."""
        self._server.start()

    def stop(self) -> None:
        """Stop accepting spans. Blocks until the last message is handled."""
        self._server.stop(1.0).wait()

    def wait(self) -> None:
        """Block until `stop` is called."""
        self._server.wait_for_termination()

    def Export(self, request: pb.ExportTraceServiceRequest, context: Any) -> pb.ExportTraceServiceResponse:
        """Receive one message of spans. This is the RPC of OTLP's TraceService."""
        self._receive(tuple(_spans(request)))
        return pb.ExportTraceServiceResponse()


def _spans(request: pb.ExportTraceServiceRequest) -> Iterator[SpanRecord]:
    for block in request.resource_spans:
        resource = _values(block.resource.attributes)
        for scope in block.scope_spans:
            for span in scope.spans:
                yield SpanRecord(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9,
                    resource,
                    _KINDS.get(span.kind, SpanKind.INTERNAL),
                    _values(span.attributes),
                    [SpanEvent(event.name, event.time_unix_nano / 1e9, {}) for event in span.events],
                    [link.span_id.hex() for link in span.links],
                    "error" if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else "",
                    span.trace_state,
                )


def _values(attributes: Any) -> dict[str, Value]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return "" if kind is None else getattr(value, kind)
