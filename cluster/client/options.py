"""Options of a channel to a gateway: size limits, retries before the first chunk, credentials, metadata."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cluster.client.resume import Request, Resumption
from cluster.client.trace_context import trace_headers

DEFAULT_ENDPOINT = "localhost:50051"
DEFAULT_TIMEOUT_S = 600.0
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_ATTEMPTS = 5  # gRPC's own upper bound
KEEPALIVE_INTERVAL_S, KEEPALIVE_TIMEOUT_S = 2.0, 2.0
"""Time without received data after which the client sends an HTTP/2 ping, and time limit for the acknowledgement.

Both times are in seconds. Pings are sent only while calls are running. Without an acknowledgement the client closes the
connection. After a pulled cable or the loss of a node, only the missing acknowledgement shows that the peer is gone.
"""
DNS_INTERVAL_S = 0.5
"""Minimum time between two DNS queries for a name, in seconds.

gRPC sends a query only when a connection is lost or cannot be made.
"""

# gRPC retries a call only before any part of the answer has arrived. Before a retry, gRPC waits for the time in the
# server's `grpc-retry-pushback-ms`, which gateways send with every error that carries RetryInfo.
# RESOURCE_EXHAUSTED is not retried: an exhausted budget may have a retry delay of a minute.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "cluster.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": MAX_ATTEMPTS,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


@dataclass(frozen=True, slots=True)
class ChannelOptions:
    """Endpoints of gateways, and the options of the channels to the gateways.

    `timeout_s` is the default deadline of a call.
    """

    endpoints: tuple[str, ...]
    api_key: str = field(default="", repr=False)
    timeout_s: float | None = DEFAULT_TIMEOUT_S
    tls_ca_file: Path | None = None
    tls: bool = False
    retries: bool = True
    resume: bool = True
    max_message_bytes: int = MAX_MESSAGE_BYTES

    @property
    def endpoint(self) -> str:
        """All endpoints in one comma-separated text, for messages."""
        return ",".join(self.endpoints)

    @classmethod
    def build(
        cls, endpoint: str | Sequence[str] | None, api_key: str | None, tls_ca_file: str | Path | None, **rest: Any
    ) -> ChannelOptions:
        """Build options from a client's arguments. Raises ValueError.

        `endpoint` and `api_key` default to the environment variables HEADRACE_ENDPOINT and HEADRACE_API_KEY. Endpoints
        must not be empty. The only allowed URL schemes are unix and dns.
        """
        endpoint = endpoint or os.environ.get("HEADRACE_ENDPOINT") or DEFAULT_ENDPOINT
        endpoints = tuple(endpoint.split(",") if isinstance(endpoint, str) else endpoint)
        for address in endpoints:
            if not address or ("://" in address and not address.startswith(("unix://", "dns://"))):
                raise ValueError(f"endpoint {address!r}: give host:port, without a scheme")
        return cls(
            endpoints=endpoints,
            api_key=api_key if api_key is not None else os.environ.get("HEADRACE_API_KEY", ""),
            tls_ca_file=Path(tls_ca_file) if tls_ca_file is not None else None,
            **rest,
        )

    def channel_options(self) -> list[tuple[str, Any]]:
        """Return gRPC channel arguments.

        The reconnect backoff starts at 0.1 s, because gRPC's default of 1 s is longer than a gateway's restart.
        """
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # gRPC's default is 30 s, but a rolling restart of gateways changes a name's addresses twice within seconds.
            ("grpc.dns_min_time_between_resolutions_ms", round(DNS_INTERVAL_S * 1000)),
            ("grpc.keepalive_time_ms", round(KEEPALIVE_INTERVAL_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            # This limit, 60 s by default, applies also to gRPC's own pings that estimate bandwidth. gRPC sends no
            # keepalive ping while such a ping is unanswered.
            ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.http2.max_pings_without_data", 0),  # a client that reads a stream sends no data
            ("grpc.enable_retries", int(self.retries)),
            ("grpc.service_config", json.dumps(SERVICE_CONFIG if self.retries else {})),
        ]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return TLS credentials, or None for plaintext.

        The root certificates are from `tls_ca_file`, or the system's root certificates if no file is given.
        """
        if self.tls_ca_file is not None:
            return grpc.ssl_channel_credentials(self.tls_ca_file.read_bytes())
        return grpc.ssl_channel_credentials() if self.tls else None

    def time_left(self, timeout_s: float | None) -> Callable[[], float | None]:
        """Return a function that returns the seconds until a call's deadline, or None if the call has no deadline.

        `timeout_s`: seconds from now to the deadline; None means the default deadline of the client.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if timeout_s is None:
            return lambda: None
        deadline = time.monotonic() + timeout_s
        return lambda: max(deadline - time.monotonic(), 0.001)

    def resumption(self, request: Request, timeout_s: float | None) -> Resumption:
        """Return the state from which a stream of `request` can be resumed.

        `timeout_s`: seconds until the stream's deadline; None means the default deadline of the client. If `resume` is
        on, sets `resumable` in the request, unless the caller has set this field.
        """
        if self.resume and not request.HasField("resumable"):
            request.resumable = True
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        return Resumption(request, timeout_s, len(self.endpoints), enabled=self.resume)

    def metadata(self, request_id: str, extra: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """Return the gRPC metadata of a call: request id, API key, the trace context of the current OpenTelemetry span,
        and the pairs in `extra`, which take precedence."""
        extra = extra or {}
        trace = {} if "traceparent" in extra else trace_headers()
        pairs = {"x-request-id": request_id, **trace, **extra}
        for name, value in self.session_metadata():
            pairs.setdefault(name, value)
        return tuple(pairs.items())

    def session_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the gRPC metadata of a session: only the API key. Request ids and trace contexts are sent with each
        call in the session."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def new_request_id() -> str:
    """Return a new, unique request id."""
    return uuid.uuid4().hex
