"""Options of a channel to a gateway: size limits, retries before the first chunk, credentials, metadata."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from cluster.client.resume import Request

DEFAULT_ENDPOINT = "localhost:50051"
DEFAULT_TIMEOUT_S = 600.0
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_ATTEMPTS = 5  # gRPC's own upper bound
KEEPALIVE_INTERVAL_S, KEEPALIVE_TIMEOUT_S = 2.0, 2.0
"""Silence after which a gateway with running calls gets an HTTP/2 ping, and the time it has to acknowledge the ping.
Otherwise the connection is closed: after a pulled cable or a lost node nothing else would end it."""
DNS_INTERVAL_S = 0.5
"""Minimum time between two DNS queries of a name. gRPC queries only when a connection is lost or cannot be made."""

# gRPC retries a call only before any part of its answer has arrived. It waits for the server's
# `grpc-retry-pushback-ms`, which gateways send with every error that carries RetryInfo.
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
    """Endpoints of the gateways and options of their channels. `timeout_s` is the default deadline of a call."""

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
        """All endpoints, comma-separated, for messages."""
        return ",".join(self.endpoints)

    @classmethod
    def build(
        cls, endpoint: str | Sequence[str] | None, api_key: str | None, tls_ca_file: str | Path | None, **rest: Any
    ) -> ChannelOptions:
        """Options from arguments; HEADRACE_ENDPOINT and HEADRACE_API_KEY replace None.

        Raises ValueError for an empty endpoint and for one with a URL scheme other than unix or dns.
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
        """gRPC channel arguments. The reconnect backoff starts at 0.1 s: gRPC's default, 1 s, outlasts a restart."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # A rolling restart of gateways changes a name's addresses twice within seconds; gRPC's default is 30 s.
            ("grpc.dns_min_time_between_resolutions_ms", round(DNS_INTERVAL_S * 1000)),
            ("grpc.keepalive_time_ms", round(KEEPALIVE_INTERVAL_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            # Also limits pings that estimate bandwidth: while one is unanswered (60 s by default) no other is sent.
            ("grpc.http2.ping_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
            ("grpc.http2.max_pings_without_data", 0),  # a client that reads a stream sends no data
            ("grpc.enable_retries", int(self.retries)),
            ("grpc.service_config", json.dumps(SERVICE_CONFIG if self.retries else {})),
        ]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials with the given or the system's root certificates; None for plaintext."""
        if self.tls_ca_file is not None:
            return grpc.ssl_channel_credentials(self.tls_ca_file.read_bytes())
        return grpc.ssl_channel_credentials() if self.tls else None

    def make_resumable(self, request: Request) -> Request:
        """Set `resumable` on a stream's request, unless the caller has set it or `resume` is off."""
        if self.resume and not request.HasField("resumable"):
            request.resumable = True
        return request

    def metadata(self, request_id: str, extra: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """gRPC metadata of a call: request id, API key and `extra`."""
        pairs = {"x-request-id": request_id, **(extra or {})}
        if self.api_key:
            pairs.setdefault("authorization", f"Bearer {self.api_key}")
        return tuple(pairs.items())


def new_request_id() -> str:
    """A unique request id."""
    return uuid.uuid4().hex
