"""Authentication and authorization of the admin port, and the conversion of errors to gRPC statuses.

A tenant administrator may act on its own tenant only. A request that names another tenant gets NOT_FOUND before any
lookup, so that the error does not show whether the other tenant exists. Without `auth` in the configuration, the port
listens on loopback and every caller is an operator. The holder of the cluster secret is an operator, too: the commands
of a local cluster present a token that is derived from the secret.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
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
from cluster.policy.tenants.identity import Principal, admin_token, is_allowed
from cluster.policy.tenants.policy import TenantPolicy

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator

log = structlog.get_logger("admin")

T = TypeVar("T")
THREADS = 4
MAX_TEXT = 8192
LOOPBACK_OPERATOR = Principal(TenantPolicy("default"), role="operator", by="nobody")
"""The principal of every admin request at a gateway without `auth`."""
_SECRET_HOLDER = Principal(TenantPolicy("default"), role="operator", by="secret", subject="cluster")


@dataclass(frozen=True, slots=True)
class Verb:
    """The authorization rule of an admin method.

    `grant`: the grant that a caller needs (policy/tenants/identity.py). `cluster_wide`: whether the method concerns the
    whole cluster. `field`: the request field that names the tenant. `any_tenant`: whether that field may be empty.
    `of_key`: whether that field holds the name of a key, which contains the tenant's name. `object`: the request field
    whose value is the object of the audit event; set for methods that the controller answers.
    """

    grant: str
    field: str = ""
    cluster_wide: bool = False
    any_tenant: bool = False
    of_key: bool = False
    object: str = ""


READ_CLUSTER = Verb("read", cluster_wide=True)
VERBS: Mapping[str, Verb] = {
    "Fleet.ListWorkers": READ_CLUSTER,
    "Fleet.AbortRequest": Verb("fleet", cluster_wide=True),
    "Fleet.Drain": Verb("fleet", cluster_wide=True),
    "Fleet.Cordon": Verb("fleet", cluster_wide=True),
    "Fleet.Uncordon": Verb("fleet", cluster_wide=True),
    "Fleet.ExplainRequest": Verb("read", "parent", any_tenant=True),
    "Fleet.GetOverview": Verb("read"),
    "Fleet.ExplainScaling": READ_CLUSTER,
    "Catalog.List": READ_CLUSTER,
    "Catalog.Get": READ_CLUSTER,
    "Catalog.Apply": Verb("fleet", cluster_wide=True),
    "Catalog.Diff": READ_CLUSTER,
    "Catalog.SetWeights": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.Promote": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.Rollback": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.Quarantine": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.LoadAdapter": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.UnloadAdapter": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.ListAdapters": READ_CLUSTER,
    "Catalog.Scale": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.Freeze": Verb("fleet", cluster_wide=True, object="name"),
    "Catalog.Unfreeze": Verb("fleet", cluster_wide=True, object="name"),
    "Tenants.Create": Verb("tenants", "tenant.name"),
    "Tenants.Get": Verb("read", "name"),
    "Tenants.List": Verb("read"),
    "Tenants.Update": Verb("tenants", "tenant.name"),
    "Tenants.Delete": Verb("tenants", "name"),
    "Tenants.Undelete": Verb("tenants", "name"),
    "Tenants.Suspend": Verb("tenants", "name"),
    "Tenants.Resume": Verb("tenants", "name"),
    "Keys.Create": Verb("keys", "parent"),
    "Keys.List": Verb("read", "parent"),
    "Keys.Rotate": Verb("keys", "name", of_key=True),
    "Keys.Revoke": Verb("keys", "name", of_key=True),
    "Usage.Query": Verb("read", "parent", any_tenant=True),
    "Usage.Export": Verb("read", "parent", any_tenant=True),
    "Usage.QuerySlo": Verb("read", "parent", any_tenant=True),
    "Audit.List": Verb("read", "parent", any_tenant=True),
}


@dataclass(frozen=True, slots=True)
class AdminCaller:
    """An authorized caller and its address. `scope`: the only tenant that the caller may access, "" for all tenants."""

    principal: Principal
    source: str
    scope: str

    @property
    def actor(self) -> str:
        """The caller's name in audit events, for example `key:k1`, `jwt:subject` or `certificate:name`."""
        return f"{self.principal.by}:{self.principal.subject}"


Method = Callable[[Any, AdminCaller], Awaitable[Message]]


@dataclass(frozen=True, slots=True)
class AdminMethod:
    """A method of the admin API with its authorization rule. `act`: the function that carries out the method, called
    with the request and the caller. It is a coroutine function that returns the answer. For a stream, it is an
    asynchronous generator function that yields the answers."""

    descriptor: MethodDescriptor
    verb: Verb
    act: Any

    @property
    def name(self) -> str:
        """The short name, for example `Fleet.Drain`."""
        return f"{self.descriptor.containing_service.name}.{self.descriptor.name}"

    @property
    def is_stream(self) -> bool:
        """Whether the method answers with a stream of messages."""
        return bool(self.descriptor.server_streaming)


class AdminAuthorizer:
    """Authorizes callers of admin methods, and builds the gRPC handlers of the methods."""

    def __init__(self, tenants: TenantAuthenticator | None) -> None:
        """`tenants`: the tenants' authenticator; None for a gateway without authentication (`auth`)."""
        self._tenants = tenants
        self._threads: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """Close the thread pool that `in_thread` uses. New functions are refused, and functions that wait for a thread
        are dropped. Running functions are not interrupted."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Run a function in one of a few threads, off the event loop. Used for functions that query the database."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="admin")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *arguments, **named))

    def handlers(self, methods: Iterable[AdminMethod]) -> Sequence[grpc.GenericRpcHandler]:
        """Return gRPC handlers that serve the methods: one handler for each service."""
        services: dict[str, dict[str, Any]] = {}
        for method in methods:
            service = services.setdefault(method.descriptor.containing_service.full_name, {})
            service[method.descriptor.name] = self._handler(method)
        return [grpc.method_handlers_generic_handler(name, handlers) for name, handlers in services.items()]

    def _handler(self, method: AdminMethod) -> Any:
        answer = self._answer_stream if method.is_stream else self._answer_unary
        make = grpc.unary_stream_rpc_method_handler if method.is_stream else grpc.unary_unary_rpc_method_handler
        guarded = self._guarded(method, partial(answer, method.act))
        return make(
            guarded, request_deserializer=bytes, response_serializer=lambda message: message.SerializeToString()
        )

    async def admit(self, call: Any) -> str | None:
        """Authenticate a call by its headers and certificate. Returns the tenant's name. Implements rpc.server.Gate."""
        try:
            principal = await self._principal(call)
        except CallError as error:
            await call.abort(grpc_code(error), error.message, trailers(error))
            raise
        call.caller = principal
        if principal is not LOOPBACK_OPERATOR:
            call.connection.mark_authenticated()
        return str(principal.tenant.name)

    async def _answer_unary(self, act: Method, request: Message, caller: AdminCaller, context: Any) -> Message:
        return await act(request, caller)

    async def _answer_stream(self, act: Any, request: Message, caller: AdminCaller, context: Any) -> None:
        async for message in act(request, caller):
            await context.write(message)

    def _guarded(
        self,
        method: AdminMethod,
        act: Callable[[Message, AdminCaller, Any], Awaitable[Message | None]],
    ) -> Callable[[bytes, Any], Awaitable[Message | None]]:
        kind = GetMessageClass(method.descriptor.input_type)

        async def handle(data: bytes, context: Any) -> Message | None:
            try:
                principal = context.caller
                request = _decoded(kind, data)
                context.request.release()
                return await act(request, self.authorize(principal, method, request, context.peer()), context)
            except CallError as error:
                await context.abort(grpc_code(error), error.message, trailers(error))
            except grpc.aio.AbortError:
                raise
            except Exception:  # callers get no traceback; the log has it under the number
                number = uuid.uuid4().hex
                log.exception("admin.request_failed", method=method.descriptor.full_name, number=number)
                unexpected = CallError(Outcome.INTERNAL, f"unexpected failure; quote number {number}")
                await context.abort(grpc_code(unexpected), unexpected.message, trailers(unexpected))
            return None

        return handle

    # ---- authentication and authorization

    async def _principal(self, context: Any) -> Principal:
        authenticator = self._tenants
        if authenticator is None:
            return LOOPBACK_OPERATOR
        metadata = context.invocation_metadata() or ()
        authorization = tuple(str(value) for key, value in metadata if key == "authorization")
        if len(authorization) == 1 and self._holds_secret(authenticator, authorization[0]):
            return _SECRET_HOLDER
        names = alternative_names(context.peer_certificate()) if authenticator.by_certificate else ()
        return await authenticator.principal(Credentials(authorization, names, context.peer()))

    @staticmethod
    def _holds_secret(authenticator: TenantAuthenticator, authorization: str) -> bool:
        presented, matches = authorization.encode("utf-8", "surrogatepass"), False
        for secret in authenticator.secrets:
            matches |= hmac.compare_digest(presented, f"Bearer {admin_token(secret)}".encode())
        return matches

    def authorize(self, principal: Principal, method: AdminMethod, request: Message, peer: str) -> AdminCaller:
        """Check a request against the rule of `method`, and return the authorized caller. `peer`: the caller's address.

        Raises CallError PERMISSION_DENIED if the caller's role does not allow the method, and NOT_FOUND if the request
        names another tenant.
        """
        verb, own_tenant = method.verb, principal.tenant.name
        all_tenants = is_allowed(principal, verb.grant)
        caller = AdminCaller(principal, peer, "" if all_tenants else own_tenant)
        if not all_tenants and (verb.cluster_wide or not is_allowed(principal, verb.grant, own_tenant)):
            self._denied(caller, method, "denied")
            raise CallError(Outcome.PERMISSION_DENIED, f"the role {principal.role} may not call {method.name}")
        tenant = _named_tenant(request, verb)
        if caller.scope and tenant and tenant != caller.scope:
            self._denied(caller, method, "not_found")
            raise CallError(Outcome.NOT_FOUND, f"tenants/{tenant} does not exist")
        return caller

    def _denied(self, caller: AdminCaller, method: AdminMethod, outcome: str) -> None:
        self.audit(caller, "auth_failure", "authorize", method.descriptor.full_name, outcome=outcome)

    def audit(
        self,
        caller: AdminCaller,
        kind: Any,
        action: str,
        name: str,
        *,
        outcome: str = "ok",
        reason: str = "",
        tenant: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Start writing an audit event, and return without waiting for the write. At a gateway without `auth`, the
        event goes to the log. `name`: the object that was acted on."""
        if self._tenants is None:
            log.info("audit.recorded", kind=kind, action=action, object=name, outcome=outcome, reason=reason)
            return
        from cluster.ledger.audit.audit import AuditEvent

        event = AuditEvent(
            time.time(),
            kind,
            action,
            caller.actor,
            tenant,
            name,
            outcome,
            reason,
            caller.source,
            {**details_of(caller), **(details or {})},
        )
        self._tenants.audit.write(event)


def details_of(caller: AdminCaller) -> dict[str, str]:
    """Return two details of an audit event: `role`, the caller's role, and `of`, the caller's tenant. `of` is "" for an
    operator without a tenant."""
    has_tenant = caller.principal not in (LOOPBACK_OPERATOR, _SECRET_HOLDER)
    return {"role": caller.principal.role, "of": caller.principal.tenant.name if has_tenant else ""}


def _named_tenant(request: Message, verb: Verb) -> str:
    """Return the tenant that a request names, "" if the request names none. Raises CallError for an invalid name."""
    value: Any = request
    for part in verb.field.split(".") if verb.field else []:
        value = getattr(value, part)
    if not verb.field or (verb.any_tenant and not value):
        return ""
    from cluster.gateway.apis.admin.codec import key_name, tenant_name

    return key_name(value, verb.field)[0] if verb.of_key else tenant_name(value, verb.field)


def _decoded(kind: type[Message], data: bytes) -> Message:
    """Decode a request, and check that a database can store its texts. Raises CallError."""
    try:
        request = kind.FromString(data)
    except DecodeError as error:
        raise invalid("", f"is not a message of this method: {error}") from None
    check_texts(request)
    return request


def check_texts(message: Message, path: str = "") -> None:
    """Check that a database can store the texts in a request: no text has a NUL character or more than MAX_TEXT
    characters. `path`: the path of the message in the request, with a dot at its end. Raises CallError, which names the
    field."""
    for field, value in message.ListFields():
        name = f"{path}{field.name}"
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            texts = [text for pair in value.items() for text in pair if isinstance(text, str)]
        elif field.message_type is not None:
            for nested in value if field.is_repeated else [value]:
                check_texts(nested, f"{name}.")
            continue
        else:
            texts = [item for item in (value if field.is_repeated else [value]) if isinstance(item, str)]
        if any("\0" in text for text in texts):
            raise invalid(name, "must not contain a NUL character")
        if any(len(text) > MAX_TEXT for text in texts):
            raise invalid(name, f"is longer than {MAX_TEXT} characters")
