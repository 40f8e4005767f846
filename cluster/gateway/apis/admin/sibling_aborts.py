"""Ending a call at the other processes of this host, which have no admin port: over their link ports.

What one process asks another carries a tag that only who has the cluster's secret can make, for this one request and
the minute: whoever listens in a dead process's place learns nothing that opens anything else.
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
from cluster.gateway.auth.tls import name_in
from cluster.policy.tenants.identity import derive, verify_any
from cluster.wire.tls import TlsFiles

TIMEOUT_S = 2.0
WINDOW_S = 60.0
SERVICE, METHOD = "cluster.admin.v1.Fleet", "AbortRequest"
TAG = "x-headrace-tag-bin"
Abort = Callable[[str, str], list[str]]


class SiblingAborts:
    """One process's side of it. `abort` is CallService.abort; without `secrets` (no `auth`) links are trusted alike."""

    def __init__(
        self,
        gateway: GatewaySettings,
        process: int,
        secrets: Sequence[bytes],
        abort: Abort,
        clock: Callable[[], float] = time.time,
    ) -> None:
        host = gateway.listen.link.rsplit(":", 1)[0]
        dialled = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - compared, not bound
        self._addresses = [f"{dialled}{port}" for port in gateway.siblings(process)]
        self._tls = gateway.link_tls
        self._secrets = tuple(secrets)
        self._abort = abort
        self._clock = clock

    # ---- asking

    async def abort(self, request_id: str, tenant: str) -> tuple[list[str], int]:
        """End the calls of a request id at all others: the tenant of each, and how many processes were silent."""
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

    def _parts(self, request: pb.AbortRequestRequest, before: int) -> tuple[str, str, str]:
        return request.request_id, request.parent, str(int(self._clock() // WINDOW_S) - before)

    # ---- answering

    def handler(self) -> grpc.GenericRpcHandler:
        """For the link port."""
        method = grpc.unary_unary_rpc_method_handler(
            self._answer,
            request_deserializer=pb.AbortRequestRequest.FromString,
            response_serializer=pb.AbortRequestResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})

    async def _answer(self, request: pb.AbortRequestRequest, context: Any) -> pb.AbortRequestResponse:
        shown = [value for key, value in context.invocation_metadata() or () if key == TAG]
        if self._secrets and not (len(shown) == 1 and self._is_good(shown[0], request)):
            error = CallError(Outcome.PERMISSION_DENIED, "only another process of this gateway may ask this")
            await context.abort(grpc_code(error), error.message, trailers(error))
        tenants = self._abort(request.request_id, request.parent)
        return pb.AbortRequestResponse(aborted=len(tenants), tenants=tenants)

    def _is_good(self, tag: bytes | str, request: pb.AbortRequestRequest) -> bool:
        raw = tag if isinstance(tag, bytes) else tag.encode()
        return any(verify_any(self._secrets, "sibling-abort", raw, *self._parts(request, one)) for one in (-1, 0, 1))


def _channel(address: str, tls: Tls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    files = TlsFiles(tls.cert_file, tls.key_file, tls.ca_file)
    # the other shows the certificate of these very files, whatever name this host has in it
    options = (("grpc.ssl_target_name_override", name_in(tls.cert_file.read_bytes())),)
    return grpc.aio.secure_channel(address, files.channel_credentials(), options=options)
