"""Requests to the other gateway processes of this host: aborts and explanations of calls, and requests for the
console's data. The requests go to the link ports of these processes, since the processes have no admin port.

Each request carries a tag that is derived from the cluster's secret. A tag is valid for one request, for at most two
minutes. So a program that has taken the port of a dead process cannot make other requests with the tags it receives.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import BytesValue

from cluster.admin.v1 import admin_pb2, routing_pb2
from cluster.api.outcomes import CallError, Outcome
from cluster.config.gateway import GatewaySettings, Tls
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.auth.tls import first_dns_name
from cluster.policy.tenants.identity import derive, verify_any
from cluster.wire.tls import TlsFiles

TIMEOUT_S = 2.0
WINDOW_S = 60.0
SERVICE = "cluster.admin.v1.Fleet"
TAG = "x-headrace-tag-bin"
CONSOLE = "AskConsole"
"""Name of the method with which a console requests data from the other processes. Requests and answers are JSON."""
METHODS: Mapping[str, tuple[Any, Any]] = {
    CONSOLE: (BytesValue, BytesValue),
    "AbortRequest": (admin_pb2.AbortRequestRequest, admin_pb2.AbortRequestResponse),
    "ExplainRequest": (routing_pb2.ExplainRequestRequest, routing_pb2.ExplainRequestResponse),
}
"""The request type and the answer type of each method. In the requests to abort and to explain a call, `parent` is the
name of a tenant, "" for all tenants."""


class Siblings:
    """Sends and answers admin requests between the gateway processes of a host.

    `answers`: for each method in METHODS, the function with which this process answers requests. `secrets`: the
    secrets from which the requests' tags (short-lived proofs of authenticity) are derived. On a gateway without
    `auth`, `secrets` is empty and requests carry no tag, since links are trusted.
    """

    def __init__(
        self,
        gateway: GatewaySettings,
        process: int,
        secrets: Sequence[bytes],
        answers: Mapping[str, Callable[[Any], Message | Awaitable[Message]]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        host = gateway.listen.link.rsplit(":", 1)[0]
        dial_host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
        self._addresses = [f"{dial_host}{port}" for port in gateway.siblings(process)]
        self._tls = gateway.link_tls
        self._secrets = tuple(secrets)
        self._answers = dict(answers)
        self._channels: dict[str, grpc.aio.Channel] = {}
        """Connections to the other processes, keyed by address. They stay open because the console sends a request
        every second."""
        self._clock = clock

    # ---- requests

    async def ask(self, method: str, request: Message) -> tuple[Sequence[Any], int]:
        """Send a request to all other processes. Returns the answers, and the number of processes that did not
        answer."""
        answers = await asyncio.gather(*(self._ask(address, method, request) for address in self._addresses))
        return [answer for answer in answers if answer is not None], answers.count(None)

    async def _ask(self, address: str, method: str, request: Message) -> Message | None:
        if method != CONSOLE:
            async with _channel(address, self._tls) as channel:
                return await self._ask_on(channel, method, request)
        if (kept := self._channels.get(address)) is None:
            kept = self._channels[address] = _channel(address, self._tls)
        answer = await self._ask_on(kept, method, request)
        if answer is None:
            await self._forget(address)
        return answer

    async def _ask_on(self, channel: grpc.aio.Channel, method: str, request: Message) -> Message | None:
        call: Any = channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=METHODS[method][1].FromString,
        )
        metadata = ((TAG, self._tag(method, request)),) if self._secrets else ()
        try:
            answer: Message = await call(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError:
            return None
        return answer

    async def _forget(self, address: str) -> None:
        """Close the connection to a process that has not answered. The next request opens a new connection and reads
        the certificate files again."""
        channel = self._channels.pop(address, None)
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """Close all connections."""
        for address in list(self._channels):
            await self._forget(address)

    def answer(self, method: str, function: Callable[[Any], Message | Awaitable[Message]]) -> None:
        """Set the function that answers the requests of a method."""
        self._answers[method] = function

    def _tag(self, method: str, request: Message) -> bytes:
        return derive(self._secrets[0], "sibling-request", *self._parts(method, request, 0))

    def _parts(self, method: str, request: Message, windows_back: int) -> tuple[str, ...]:
        window = int(self._clock() // WINDOW_S) - windows_back
        return method, request.SerializeToString(deterministic=True).hex(), str(window)

    # ---- answers

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the RPC handler of METHODS, for this process's link port."""
        return grpc.method_handlers_generic_handler(SERVICE, {method: self._handler_of(method) for method in METHODS})

    def _handler_of(self, method: str) -> Any:
        async def answer(request: Message, context: Any) -> Message:
            tags = [value for key, value in context.invocation_metadata() or () if key == TAG]
            if self._secrets and not (len(tags) == 1 and self._is_valid(tags[0], method, request)):
                error = CallError(
                    Outcome.PERMISSION_DENIED, "only another process of this gateway may call this method"
                )
                await context.abort(grpc_code(error), error.message, trailers(error))
            answered = self._answers[method](request)
            return await answered if inspect.isawaitable(answered) else answered

        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=METHODS[method][0].FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _is_valid(self, tag: bytes | str, method: str, request: Message) -> bool:
        raw = tag if isinstance(tag, bytes) else tag.encode()
        return any(
            verify_any(self._secrets, "sibling-request", raw, *self._parts(method, request, offset))
            for offset in (-1, 0, 1)
        )


def _channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    files = TlsFiles(tls.cert_file, tls.key_file, tls.ca_file)
    # The other process presents the certificate from these same files. The host name in that certificate is expected,
    # since it may differ from the address that is dialed.
    options = (("grpc.ssl_target_name_override", first_dns_name(tls.cert_file.read_bytes())),)
    return grpc.aio.secure_channel(address, files.channel_credentials(), options=options)
