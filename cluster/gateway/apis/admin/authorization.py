"""The door of the admin port: who asks, whether the role grants it, and how what follows becomes an answer.

A tenant's administrator acts on the own tenant alone; any other reads as one that does not exist, whether it does or
not, and that is decided before anything is looked up. Without `auth` the port is on loopback, and who reaches it is
an operator. Who holds the cluster's secret is one too: a local cluster's own commands show what is derived from it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.auth.authenticator import Credentials, alternative_names
from cluster.policy.tenants.identity import Principal, admin_token, may
from cluster.policy.tenants.policy import TenantPolicy

if TYPE_CHECKING:
    from google.protobuf.descriptor import FileDescriptor

    from cluster.gateway.auth.tenants import TenantAuthenticator

log = structlog.get_logger("admin")

T = TypeVar("T")
THREADS = 4
MAX_TEXT = 8192
_ANYBODY = Principal(TenantPolicy("default"), role="operator", by="nobody")
_SECRET_HOLDER = Principal(TenantPolicy("default"), role="operator", by="secret", subject="cluster")


@dataclass(frozen=True, slots=True)
class Verb:
    """What a method needs: the grant of policy/tenants/identity.py, and the field that names the tenant.

    `whole`: it is about the cluster and not about tenants. `any_tenant`: the field may be empty;
    `of_key`: it names a key. `object`: of one that the controller answers, the field that the audit names.
    """

    what: str
    field: str = ""
    whole: bool = False
    any_tenant: bool = False
    of_key: bool = False
    object: str = ""


READ_CLUSTER = Verb("read", whole=True)
VERBS: Mapping[str, Verb] = {
    "Fleet.ListWorkers": READ_CLUSTER,
    "Fleet.AbortRequest": Verb("fleet", whole=True),
    "Fleet.Drain": Verb("fleet", whole=True),
    "Fleet.Cordon": Verb("fleet", whole=True),
    "Fleet.Uncordon": Verb("fleet", whole=True),
    "Fleet.ExplainScaling": READ_CLUSTER,
    "Catalog.List": READ_CLUSTER,
    "Catalog.Get": READ_CLUSTER,
    "Catalog.Apply": Verb("fleet", whole=True),
    "Catalog.Diff": READ_CLUSTER,
    "Catalog.SetWeights": Verb("fleet", whole=True, object="name"),
    "Catalog.Promote": Verb("fleet", whole=True, object="name"),
    "Catalog.Rollback": Verb("fleet", whole=True, object="name"),
    "Catalog.Quarantine": Verb("fleet", whole=True, object="name"),
    "Catalog.Scale": Verb("fleet", whole=True, object="name"),
    "Catalog.Freeze": Verb("fleet", whole=True, object="name"),
    "Catalog.Unfreeze": Verb("fleet", whole=True, object="name"),
    "Tenants.Create": Verb("tenants", "tenant.name"),
    "Tenants.Get": Verb("read", "name"),
    "Tenants.List": Verb("read"),
    "Tenants.Update": Verb("tenants", "tenant.name"),
    "Tenants.Delete": Verb("tenants", "name"),
    "Tenants.Suspend": Verb("tenants", "name"),
    "Tenants.Resume": Verb("tenants", "name"),
    "Keys.Create": Verb("keys", "parent"),
    "Keys.List": Verb("read", "parent"),
    "Keys.Rotate": Verb("keys", "name", of_key=True),
    "Keys.Revoke": Verb("keys", "name", of_key=True),
    "Usage.Query": Verb("read", "parent", any_tenant=True),
    "Usage.Export": Verb("read", "parent", any_tenant=True),
    "Audit.List": Verb("read", "parent", any_tenant=True),
}


@dataclass(frozen=True, slots=True)
class AdminCaller:
    """Who asks, and from where. `scope`: the only tenant that the role reaches, "" for all."""

    principal: Principal
    source: str
    scope: str

    @property
    def actor(self) -> str:
        """For the audit: `key:k1`, `jwt:subject`, `certificate:name`."""
        return f"{self.principal.by}:{self.principal.subject}"


Method = Callable[[Any, AdminCaller], Awaitable[Message]]


class AdminAuthorizer:
    """Makes handlers of services: objects with a coroutine `(request, asker)` for each method."""

    def __init__(self, tenants: TenantAuthenticator | None) -> None:
        """`tenants`: the door of a gateway with `auth`."""
        self._tenants = tenants
        self._threads: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Take no more work; what runs in a database ends by itself."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run what asks the database, off the event loop, beside no more than a few others."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="admin")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *arguments, **named))

    def handlers(
        self,
        file: FileDescriptor,
        services: Mapping[str, object],
        elsewhere: Callable[[MethodDescriptor, Verb], Method] | None = None,
    ) -> Sequence[grpc.GenericRpcHandler]:
        """Of every service of a proto file; `services` by their short names. `elsewhere`: gives the methods that they
        lack (forwarding.py)."""
        made = []
        for name, service in file.services_by_name.items():
            methods = {method.name: self._handler(method, services[name], elsewhere) for method in service.methods}
            made.append(grpc.method_handlers_generic_handler(service.full_name, methods))
        return made

    def _handler(
        self,
        method: MethodDescriptor,
        service: object,
        elsewhere: Callable[[MethodDescriptor, Verb], Method] | None,
    ) -> Any:
        verb = VERBS[f"{method.containing_service.name}.{method.name}"]
        act = getattr(service, method.name, None)
        if act is None:
            assert elsewhere is not None, f"nobody answers {method.full_name}"
            act = elsewhere(method, verb)
        answer = self._stream if method.server_streaming else self._whole
        make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
        guarded = self._guarded(method, verb, partial(answer, act))
        return make(
            guarded, request_deserializer=bytes, response_serializer=lambda message: message.SerializeToString()
        )

    async def admit(self, call: Any) -> str | None:
        """See rpc.server.Gate."""
        try:
            principal = await self._principal(call)
        except CallError as error:
            await call.abort(grpc_code(error), error.message, trailers(error))
            raise
        call.caller = principal
        if principal is not _ANYBODY:
            call.connection.prove()
        return str(principal.tenant.name)

    async def _whole(self, act: Method, request: Message, asker: AdminCaller, context: Any) -> Message:
        return await act(request, asker)

    async def _stream(self, act: Any, request: Message, asker: AdminCaller, context: Any) -> None:
        async for message in act(request, asker):
            await context.write(message)

    def _guarded(
        self,
        method: MethodDescriptor,
        verb: Verb,
        act: Callable[[Message, AdminCaller, Any], Awaitable[Message | None]],
    ) -> Callable[[bytes, Any], Awaitable[Message | None]]:
        kind = GetMessageClass(method.input_type)

        async def handle(data: bytes, context: Any) -> Message | None:
            try:
                principal = context.caller
                request = _decoded(kind, data)
                context.release_request()
                return await act(request, self._asker(principal, method, verb, request, context.peer()), context)
            except CallError as error:
                await context.abort(grpc_code(error), error.message, trailers(error))
            except grpc.aio.AbortError:
                raise
            except Exception:  # no traceback reaches a caller
                number = uuid.uuid4().hex
                log.exception("unexpected", method=method.full_name, number=number)
                unexpected = CallError(Outcome.INTERNAL, f"unexpected failure; quote number {number}")
                await context.abort(grpc_code(unexpected), unexpected.message, trailers(unexpected))
            return None

        return handle

    # ---- who, and what they may

    async def _principal(self, context: Any) -> Principal:
        door = self._tenants
        if door is None:
            return _ANYBODY
        metadata = context.invocation_metadata() or ()
        authorization = tuple(str(value) for key, value in metadata if key == "authorization")
        if len(authorization) == 1 and self._holds_secret(door, authorization[0]):
            return _SECRET_HOLDER
        names = alternative_names(context.peer_certificate()) if door.by_certificate else ()
        return await door.principal(Credentials(authorization, names, context.peer()))

    @staticmethod
    def _holds_secret(door: TenantAuthenticator, authorization: str) -> bool:
        shown, good = authorization.encode("utf-8", "surrogatepass"), False
        for secret in door.secrets:
            good |= hmac.compare_digest(shown, f"Bearer {admin_token(secret)}".encode())
        return good

    def _asker(
        self, principal: Principal, method: MethodDescriptor, verb: Verb, request: Message, peer: str
    ) -> AdminCaller:
        own = principal.tenant.name
        everywhere = may(principal, verb.what)
        asker = AdminCaller(principal, peer, "" if everywhere else own)
        if not everywhere and (verb.whole or not may(principal, verb.what, own)):
            self._denied(asker, method, "denied")
            raise CallError(
                Outcome.PERMISSION_DENIED,
                f"the role {principal.role} may not call {method.containing_service.name}.{method.name}",
            )
        tenant = _named_tenant(request, verb)
        if asker.scope and tenant and tenant != asker.scope:
            self._denied(asker, method, "not_found")
            raise CallError(Outcome.NOT_FOUND, f"tenants/{tenant} does not exist")
        return asker

    def _denied(self, asker: AdminCaller, method: MethodDescriptor, outcome: str) -> None:
        self.audit(asker, "auth_failure", "authorize", method.full_name, outcome=outcome)

    def audit(
        self,
        asker: AdminCaller,
        kind: Any,
        action: str,
        name: str,
        *,
        outcome: str = "ok",
        reason: str = "",
        tenant: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell the audit, or the log of a gateway that keeps none. Does not wait."""
        if self._tenants is None:
            log.info("audit", kind=kind, action=action, object=name, outcome=outcome, reason=reason)
            return
        from cluster.ledger.audit.audit import AuditEvent

        event = AuditEvent(
            time.time(),
            kind,
            action,
            asker.actor,
            tenant,
            name,
            outcome,
            reason,
            asker.source,
            {**details_of(asker), **(details or {})},
        )
        self._tenants.audit.write(event)


def details_of(asker: AdminCaller) -> dict[str, str]:
    """What every event of an asker says of them."""
    own = asker.principal not in (_ANYBODY, _SECRET_HOLDER)  # these are of no tenant
    return {"role": asker.principal.role, "of": asker.principal.tenant.name if own else ""}


def _named_tenant(request: Message, verb: Verb) -> str:
    """The tenant that a request names, "" for none. Raises CallError for what is no name."""
    value: Any = request
    for part in verb.field.split(".") if verb.field else []:
        value = getattr(value, part)
    if not verb.field or (verb.any_tenant and not value):
        return ""
    from cluster.gateway.apis.admin.codec import key_name, tenant_name

    return key_name(value, verb.field)[0] if verb.of_key else tenant_name(value, verb.field)


def _decoded(kind: type[Message], data: bytes) -> Message:
    """A request, with nothing in it that a database would choke on. Raises CallError."""
    try:
        request = kind.FromString(data)
    except DecodeError as error:
        raise invalid("", f"is not a message of this method: {error}") from None
    _check_texts(request, "")
    return request


def _check_texts(message: Message, path: str) -> None:
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            texts = [text for pair in value.items() for text in pair if isinstance(text, str)]
        elif field.message_type is not None:
            for one in value if field.is_repeated else [value]:
                _check_texts(one, f"{name}.")
            continue
        else:
            texts = [one for one in (value if field.is_repeated else [value]) if isinstance(one, str)]
        if any("\0" in text for text in texts):
            raise invalid(name, "holds a NUL character")
        if any(len(text) > MAX_TEXT for text in texts):
            raise invalid(name, f"is longer than {MAX_TEXT} characters")
