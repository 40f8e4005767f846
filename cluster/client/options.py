"""How a channel to a gateway is made: size limits, retries before the first chunk, credentials, metadata."""

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
ASK_S, ANSWER_S = 2.0, 2.0
"""A gateway that says nothing for so long while calls run is asked whether it is there, and left when it does not
answer: after a pulled cable or a lost node nobody ends the connection."""
ADDRESSES_S = 0.5
"""A name's addresses are asked for at most so often, and only when a connection is lost or cannot be made."""

# gRPC retries a call only while nothing of its answer has arrived, and waits as long as the server's
# `grpc-retry-pushback-ms` says, which gateways send with every error that RetryInfo accompanies.
# RESOURCE_EXHAUSTED is left to the caller: a used-up budget may say "come back in a minute".
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
    """Where gateways are and how to speak to them. `timeout_s` is a call's deadline unless the call names its own."""

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
        """All of them, for people."""
        return ",".join(self.endpoints)

    @classmethod
    def build(
        cls, endpoint: str | Sequence[str] | None, api_key: str | None, tls_ca_file: str | Path | None, **rest: Any
    ) -> ChannelOptions:
        """With HEADRACE_ENDPOINT and HEADRACE_API_KEY where an argument is None. Raises ValueError."""
        endpoint = endpoint or os.environ.get("HEADRACE_ENDPOINT") or DEFAULT_ENDPOINT
        endpoints = tuple(endpoint.split(",") if isinstance(endpoint, str) else endpoint)
        for one in endpoints:
            if not one or ("://" in one and not one.startswith(("unix://", "dns://"))):
                raise ValueError(f"endpoint {one!r}: give host:port, without a scheme")
        return cls(
            endpoints=endpoints,
            api_key=api_key if api_key is not None else os.environ.get("HEADRACE_API_KEY", ""),
            tls_ca_file=Path(tls_ca_file) if tls_ca_file is not None else None,
            **rest,
        )

    def channel_options(self) -> list[tuple[str, Any]]:
        """gRPC channel arguments. Reconnecting starts at 0.1 s: gRPC's own default of 1 s outlasts a restart."""
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # A roll of gateways changes a name's addresses twice within seconds; gRPC would ask again after 30 s.
            ("grpc.dns_min_time_between_resolutions_ms", round(ADDRESSES_S * 1000)),
            ("grpc.keepalive_time_ms", round(ASK_S * 1000)),
            ("grpc.keepalive_timeout_ms", round(ANSWER_S * 1000)),
            # And of pings that measure the connection, while one of which is unanswered no other is sent: 60 s else.
            ("grpc.http2.ping_timeout_ms", round(ANSWER_S * 1000)),
            ("grpc.http2.max_pings_without_data", 0),  # a reader of streams sends nothing itself
            ("grpc.enable_retries", int(self.retries)),
            ("grpc.service_config", json.dumps(SERVICE_CONFIG if self.retries else {})),
        ]

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS with the given or the system's roots; None for plain text."""
        if self.tls_ca_file is not None:
            return grpc.ssl_channel_credentials(self.tls_ca_file.read_bytes())
        return grpc.ssl_channel_credentials() if self.tls else None

    def streamed(self, request: Request) -> Request:
        """The request of a stream, which is resumable unless somebody does not want it."""
        if self.resume and not request.HasField("resumable"):
            request.resumable = True
        return request

    def metadata(self, request_id: str, extra: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """What goes with a call, beside its body."""
        pairs = {"x-request-id": request_id, **(extra or {})}
        if self.api_key:
            pairs.setdefault("authorization", f"Bearer {self.api_key}")
        return tuple(pairs.items())


def new_request_id() -> str:
    """One that nobody else has."""
    return uuid.uuid4().hex
