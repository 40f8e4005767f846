"""Aborts of calls in the other gateway processes of this host. Abort requests go to the link ports of these processes,
since the processes have no admin port.

Each abort request carries a tag that is derived from the cluster's secret. A tag is valid for one request, for at most
two minutes. So a program that has taken the port of a dead process cannot abort other calls with the tags it receives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from cluster.admin.v1 import admin_pb2 as pb
from cluster.api.outcomes import CallError, Outcome
from cluster.config.gateway import GatewaySettings, Tls
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.auth.tls import first_dns_name
from cluster.policy.tenants.identity import derive, verify_any
from cluster.wire.tls import TlsFiles

TIMEOUT_S = 2.0
WINDOW_S = 60.0
SERVICE, METHOD = "cluster.admin.v1.Fleet", "AbortRequest"
TAG = "x-headrace-tag-bin"
Abort = Callable[[str, str], list[str]]


class SiblingAborts:
    """Sends and answers abort requests between the gateway processes of a host. `abort`: ends calls of this process
    (CallService.abort). `secrets`: empty without `auth`; requests then carry no tag, since links are trusted."""

    def __init__(
        self,
        gateway: GatewaySettings,
        process: int,
        secrets: Sequence[bytes],
        abort: Abort,
        clock: Callable[[], float] = time.time,
    ) -> None:
        host = gateway.listen.link.rsplit(":", 1)[0]
        dial_host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
        self._addresses = [f"{dial_host}{port}" for port in gateway.siblings(process)]
        self._tls = gateway.link_tls
        self._secrets = tuple(secrets)
        self._abort = abort
        self._clock = clock

    # ---- requests

    async def abort(self, request_id: str, tenant: str) -> tuple[list[str], int]:
        """Abort the calls with a request id in all other processes. Returns the tenant of each aborted call, and the
        number of processes that did not answer."""
        request = pb.AbortRequestRequest(request_id=request_id, parent=tenant)
        answers = await asyncio.gather(*(self._ask(address, request) for address in self._addresses))
        return [tenant for answer in answers if answer for tenant in answer.tenants], answers.count(None)

    async def _ask(self, address: str, request: pb.AbortRequestRequest) -> pb.AbortRequestResponse | None:
        async with _channel(address, self._tls) as channel:
            call: Any = channel.unary_unary(
                f"/{SERVICE}/{METHOD}",
                request_serializer=pb.AbortRequestRequest.SerializeToString,
                response_deserializer=pb.AbortRequestResponse.FromString,
            )
            metadata = ((TAG, self._tag(request)),) if self._secrets else ()
            try:
                answer: pb.AbortRequestResponse = await call(request, timeout=TIMEOUT_S, metadata=metadata)
            except grpc.aio.AioRpcError:
                return None
            return answer

    def _tag(self, request: pb.AbortRequestRequest) -> bytes:
        return derive(self._secrets[0], "sibling-abort", *self._parts(request, 0))

    def _parts(self, request: pb.AbortRequestRequest, windows_back: int) -> tuple[str, str, str]:
        return request.request_id, request.parent, str(int(self._clock() // WINDOW_S) - windows_back)

    # ---- answers

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the RPC handler of abort requests, for this process's link port."""
        method = grpc.unary_unary_rpc_method_handler(
            self._answer,
            request_deserializer=pb.AbortRequestRequest.FromString,
            response_serializer=pb.AbortRequestResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})

    async def _answer(self, request: pb.AbortRequestRequest, context: Any) -> pb.AbortRequestResponse:
        tags = [value for key, value in context.invocation_metadata() or () if key == TAG]
        if self._secrets and not (len(tags) == 1 and self._is_valid(tags[0], request)):
            error = CallError(Outcome.PERMISSION_DENIED, "only another process of this gateway may call this method")
            await context.abort(grpc_code(error), error.message, trailers(error))
        tenants = self._abort(request.request_id, request.parent)
        return pb.AbortRequestResponse(aborted=len(tenants), tenants=tenants)

    def _is_valid(self, tag: bytes | str, request: pb.AbortRequestRequest) -> bool:
        raw = tag if isinstance(tag, bytes) else tag.encode()
        return any(
            verify_any(self._secrets, "sibling-abort", raw, *self._parts(request, offset)) for offset in (-1, 0, 1)
        )


def _channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    files = TlsFiles(tls.cert_file, tls.key_file, tls.ca_file)
    # The other process presents the certificate from these same files. The host name in that certificate is expected,
    # since it may differ from the address that is dialed.
    options = (("grpc.ssl_target_name_override", first_dns_name(tls.cert_file.read_bytes())),)
    return grpc.aio.secure_channel(address, files.channel_credentials(), options=options)
