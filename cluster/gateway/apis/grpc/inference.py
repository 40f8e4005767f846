"""cluster.v1.Inference over gRPC: bytes become a wish, pieces become chunks, an error becomes a status."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import grpc
import structlog
from google.protobuf.message import Message

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, Kind, voice_of
from cluster.gateway.apis.grpc.requests import MAX_PAGE_TOKEN, DetokenizeCall, ResumedCall, TokenizeCall
from cluster.gateway.apis.grpc.session import SessionStream
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.apis.request_ids import random_id, request_id, traceparent
from cluster.gateway.auth.authenticator import ANYBODY, Credentials, alternative_names
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.calls.stream_writer import ChunkDelivery, StreamWriter
from cluster.gateway.service import CallService
from cluster.policy.tenants.identity import Principal
from cluster.v1 import inference_pb2 as pb

log = structlog.get_logger("grpc")

SERVICE = "cluster.v1.Inference"
UNCOUNTED = ("ListModels", "GetModel")
"""Methods that count as nobody's requests."""
MAX_PAGE_SIZE = 1000
ASK_AGAIN_S = 1.0
"""A request's body may end long after its head was let in. Its caller is checked again if the snapshot of callers has
changed since, or if so many seconds have passed."""


class Admitted(NamedTuple):
    """A caller who was let in at the time `at`, by the snapshot that the door then had (`Door.knows`)."""

    principal: Principal
    known: object
    at: float


def _as_it_came(data: bytes) -> bytes:
    """A request's body before anybody has looked at it."""
    return data


def _encode(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


class InferenceApi:
    """The gRPC face of a CallService."""

    def __init__(self, service: CallService, session_age_s: float = 600.0) -> None:
        """`session_age_s`: a session older than this takes no new call and ends with its last one."""
        self._service = service
        self._bodies = service.bodies
        self._session_age_s = session_age_s
        self._relay: ChunkDelivery | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        """All methods of the service."""
        methods: dict[str, tuple[Callable[[Any, Any, CallMeta], Awaitable[Message | None]], bool]] = {
            "Chat": (lambda r, c, m: self._whole(CHAT, r, c, m), False),
            "StreamChat": (lambda r, c, m: self._run(CHAT, r, c, m), True),
            "Complete": (lambda r, c, m: self._whole(COMPLETE, r, c, m), False),
            "StreamComplete": (lambda r, c, m: self._run(COMPLETE, r, c, m), True),
            "Resume": (lambda r, c, m: self._resume(r, c, m), True),
            "Tokenize": (lambda r, c, m: self._tokenize(r, m), False),
            "Detokenize": (lambda r, c, m: self._detokenize(r, m), False),
            "ListModels": (lambda r, c, m: self._list_models(r, m), False),
            "GetModel": (lambda r, c, m: self._get_model(r, m), False),
        }
        handlers: dict[str, Any] = {}
        for name, (method, streams) in methods.items():
            make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            guarded = self._guarded(method, name)
            handlers[name] = make(guarded, request_deserializer=_as_it_came, response_serializer=_encode)
        handlers["Session"] = grpc.stream_stream_rpc_method_handler(
            self._session, request_deserializer=_as_it_came, response_serializer=_encode
        )
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def admit(self, call: Any) -> str | None:
        """See rpc.server.Gate: a call's credential is checked before any more of its request is taken. Health checks
        and reflection ask for none."""
        if not call.path.startswith(f"/{SERVICE}/"):
            return None
        door, before = self._service.door, call.caller
        try:
            known, now = door.knows(), self._service.clock()
            if before is not None and before.known is known and now - before.at < ASK_AGAIN_S:
                return str(before.principal.tenant.name)
            principal = await door.principal(self._shown(call))
        except CallError as error:
            await self._abort(call, self._meta(call), error)
            raise
        call.caller = Admitted(principal, known, now)
        if principal is not ANYBODY:
            call.connection.prove()
        return str(principal.tenant.name)

    async def _session(self, request_iterator: object, context: Any) -> None:
        """One identity a session: it is asked for at its head, and again when what is known of callers changes."""
        door = self._service.door
        try:
            visitor = await door.visit(self._shown(context))
        except CallError as error:
            await self._abort(context, self._meta(context), error)
            return
        try:
            await SessionStream(
                self._service, context, visitor, self._meta(context).traceparent, self._session_age_s
            ).run()
        finally:
            door.leave(visitor)

    def _guarded(
        self,
        method: Callable[[Any, Any, CallMeta], Awaitable[Message | None]],
        name: str,
    ) -> Callable[[Any, Any], Any]:
        """The one place where an error of a call becomes a status. `admit` has found out who calls."""

        async def handle(data: bytes, context: Any) -> Message | None:
            meta = self._meta(context, context.caller.principal)
            try:
                if name not in UNCOUNTED:
                    meta = await self._service.count(meta)
                request = await self._bodies.message(
                    name, data, meta.tenant, partial(self._service.longest_context, meta.principal)
                )
                context.release_request()
                context.set_trailing_metadata((("x-request-id", meta.request_id),))
                return await method(request, context, meta)
            except CallError as error:
                await self._abort(context, meta, error)
            except (grpc.aio.AbortError, grpc.aio.UsageError):
                raise
            except Exception:  # no traceback reaches a caller; it is in the log under the request's id
                log.exception("unexpected", request_id=meta.request_id)
                unexpected = CallError(Outcome.INTERNAL, f"unexpected failure; quote request id {meta.request_id}")
                await self._abort(context, meta, unexpected)
            return None

        return handle

    async def _abort(self, context: Any, meta: CallMeta, error: CallError) -> None:
        metadata = (*trailers(error), ("x-request-id", meta.request_id))
        await context.abort(grpc_code(error), error.message, metadata)

    def _shown(self, context: Any) -> Credentials:
        """What the caller shows."""
        metadata = context.invocation_metadata() or ()
        authorization = tuple(str(value) for key, value in metadata if key == "authorization")
        names = alternative_names(context.peer_certificate()) if self._service.door.by_certificate else ()
        return Credentials(authorization, names, context.peer())

    def _meta(self, context: Any, principal: Principal = ANYBODY) -> CallMeta:
        own_id = trace = ""
        for key, value in context.invocation_metadata() or ():
            if key == "x-request-id":
                own_id = request_id(value) or own_id
            elif key == "traceparent":
                trace = traceparent(value) or trace
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else self._service.clock() + remaining_s
        return CallMeta(own_id or random_id(), "grpc", deadline, trace, principal)

    # ---- calls

    async def _resume(self, request: ResumedCall, context: Any, meta: CallMeta) -> None:
        await self._run(CHAT if request.is_chat else COMPLETE, request.wish, context, meta)

    async def _run(self, kind: Kind, wish: GenerationRequest, context: Any, meta: CallMeta) -> None:
        async with self._service.open(wish, meta) as call:
            await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            if self._relay is None:
                self._relay = ChunkDelivery()
            voice = voice_of(kind, call, self._service)
            if call.continues:
                context.send(voice.begin())
            await StreamWriter(call, voice, context, self._relay).run()

    async def _whole(self, kind: Kind, wish: GenerationRequest, context: Any, meta: CallMeta) -> Message:
        async with self._service.open(wish, meta) as call:
            while not call.finished and call.error is None:
                await call.news()
            pieces = call.take()
            if call.error is not None:
                raise call.error
            await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            return kind.response(call, pieces)

    # ---- tokens and models

    async def _tokenize(self, request: TokenizeCall, meta: CallMeta) -> pb.TokenizeResponse:
        ids, max_model_len = await self._service.tokenize(request.model, request.prompt, meta)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=max_model_len)

    async def _detokenize(self, request: DetokenizeCall, meta: CallMeta) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self._service.detokenize(request.model, request.token_ids, meta))

    async def _list_models(self, request: pb.ListModelsRequest, meta: CallMeta) -> pb.ListModelsResponse:
        directory, who = self._service.directory, meta.principal
        known = {model.name: model for model in directory.open_to(who)}
        page, token = paginate(list(known), request.page_size, request.page_token)
        models = [codec.model_pb(known[name], directory.aliases(known[name], who)) for name in page]
        return pb.ListModelsResponse(models=models, next_page_token=token)

    async def _get_model(self, request: pb.GetModelRequest, meta: CallMeta) -> pb.Model:
        directory = self._service.directory
        model = directory.resolve(request.name, meta.principal)
        return codec.model_pb(model, directory.aliases(model, meta.principal))


def paginate(names: Sequence[str], page_size: int, page_token: str) -> tuple[Sequence[str], str]:
    """One page of sorted names and the token of the next (AIP-158). Raises CallError."""
    if page_size < 0:
        raise invalid("page_size", f"must not be negative, got {page_size}")
    after = _after(page_token) if page_token else ""
    rest = [name for name in names if name > after] if after else list(names)
    size = min(page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
    page = rest[:size]
    more = json.dumps({"after": page[-1]}).encode().hex() if len(rest) > size else ""
    return page, more


def _after(page_token: str) -> str:
    """The name that a page token's page begins behind. Raises CallError."""
    try:
        after = json.loads(bytes.fromhex(page_token[:MAX_PAGE_TOKEN]))["after"]
    except (ValueError, KeyError, TypeError, RecursionError):
        after = None
    if not isinstance(after, str):
        raise invalid("page_token", "is not one that this method has returned")
    return after
