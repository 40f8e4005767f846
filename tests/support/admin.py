"""Client of the admin port, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc

from cluster.admin.v1 import admin_pb2_grpc, tenants_pb2_grpc, usage_pb2_grpc
from cluster.ledger.store import Ledger
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.calls import Answer
from tests.support.keyed import bearer, eventually


class AdminClient:
    """Client of all admin services with one credential.

    `metadata` replaces `key` for a credential that is not a key.
    """

    def __init__(
        self, address: str, key: str = "", *, metadata: Sequence[tuple[str, str]] = (), tls: Any = None
    ) -> None:
        options = (("grpc.use_local_subchannel_pool", 1),)
        self.channel = (
            grpc.aio.insecure_channel(address, options=options)
            if tls is None
            else grpc.aio.secure_channel(address, tls, options=options)
        )
        self._metadata = tuple(metadata) or (bearer(key) if key else ())
        self._stubs = {
            "Fleet": admin_pb2_grpc.FleetStub(self.channel),
            "Catalog": admin_pb2_grpc.CatalogStub(self.channel),
            "Tenants": tenants_pb2_grpc.TenantsStub(self.channel),
            "Keys": tenants_pb2_grpc.KeysStub(self.channel),
            "Usage": usage_pb2_grpc.UsageStub(self.channel),
            "Audit": usage_pb2_grpc.AuditStub(self.channel),
        }

    async def __aenter__(self) -> AdminClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def ask(self, verb: str, request: Any, timeout_s: float = 60.0) -> Any:
        """Call the method `verb` (`Service.Method`). Raises AioRpcError.

        Returns the answer; the answers of a stream as a list.
        """
        service, method = verb.split(".")
        call = getattr(self._stubs[service], method)(request, metadata=self._metadata, timeout=timeout_s)
        return [message async for message in call] if hasattr(call, "__aiter__") else await call

    async def refused(self, verb: str, request: Any, timeout_s: float = 60.0) -> Answer:
        """Return the error of a call that must fail."""
        try:
            answer = await self.ask(verb, request, timeout_s)
        except grpc.aio.AioRpcError as error:
            return Answer(error)
        raise AssertionError(f"{verb} was granted: {answer}")

    async def code(self, verb: str, request: Any) -> str:
        """Call a method and return the name of its status code, such as OK."""
        try:
            await self.ask(verb, request)
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"


async def role_key(ledger: Ledger, tenant: str, role: str) -> str:
    """Create a key with a role and return it. The tenant is created if it is missing."""

    def make() -> str:
        if tenant not in {entry.policy.name for entry in ledger.tenants.list()}:
            ledger.tenants.create(TenantPolicy(tenant))
        return ledger.keys.create(tenant, role, role=role).secret

    return await asyncio.to_thread(make)


async def until_known(client: AdminClient, verb: str, request: Any) -> None:
    """Repeat a request until the client's credential is accepted."""

    async def known() -> bool:
        return await client.code(verb, request) != "UNAUTHENTICATED"

    await eventually(known, "the key is known")
