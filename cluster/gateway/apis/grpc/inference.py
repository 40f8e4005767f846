"""The service cluster.v1.Inference. It decodes requests, streams chunks, and maps errors to gRPC statuses."""

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
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, Kind, encoder_for
from cluster.gateway.apis.grpc.pooling import pooling_response
from cluster.gateway.apis.grpc.requests import MAX_PAGE_TOKEN, DetokenizeCall, ResumedCall, TokenizeCall
from cluster.gateway.apis.grpc.session import SessionStream
from cluster.gateway.apis.grpc.status import grpc_code, trailers
from cluster.gateway.apis.request_ids import random_id, request_id, trace_state, traceparent
from cluster.gateway.apis.slices import in_slices
from cluster.gateway.apis.whole_logprobs import WholeAnswer
from cluster.gateway.auth.authenticator import DEFAULT_PRINCIPAL, Credentials, alternative_names
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.pooling.pooling_request import ParsedPooling
from cluster.gateway.calls.request import GenerationRequest
from cluster.gateway.calls.stream_writer import ChunkDelivery, StreamWriter
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.target import Target
from cluster.observe.log import CallFields
from cluster.policy.tenants.identity import Principal
from cluster.v1 import inference_pb2 as pb

log = structlog.get_logger("grpc")

SERVICE = "cluster.v1.Inference"
UNCOUNTED = ("ListModels", "GetModel")
"""Methods whose requests do not count against the request limits of a tenant."""
MAX_PAGE_SIZE = 1000
LARGE_BYTES = 1 << 18
"""Size in bytes above which an answer of text counts in the budget for unread answers."""
RECHECK_S = 1.0
"""Seconds for which the authentication at the headers of a request also holds for its body. If the body arrives later,
or if tenants or keys have changed since the headers came, the caller is authenticated again."""


class AdmittedCaller(NamedTuple):
    """An authenticated caller. `at`: the time of the authentication. `snapshot`: the object that `Authenticator.knows`
    returned at that time. If `knows` now returns another object, tenants or keys have changed since then."""

    principal: Principal
    snapshot: object
    at: float


def _raw_body(data: bytes) -> bytes:
    """Return a request's bytes unchanged. Used as the deserializer of all methods, because requests are decoded after
    the checks."""
    return data


def _encode(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


class InferenceApi:
    """The gRPC API of a CallService."""

    def __init__(self, service: CallService, session_age_s: float = 600.0) -> None:
        """`session_age_s`: seconds after which a session takes no new calls; the session ends with its last call."""
        self._service = service
        self._bodies = service.bodies
        self._session_age_s = session_age_s
        self._delivery: ChunkDelivery | None = None

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the gRPC handler of all methods of the service."""
        codecs: dict[str, Any] = {"request_deserializer": _raw_body, "response_serializer": _encode}
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods: dict[str, tuple[Any, Callable[[Any, Any, CallMeta], Awaitable[Message | bytes | None]]]] = {
            "Chat": (unary, partial(self._answer_unary, CHAT)),
            "StreamChat": (stream, partial(self._answer_stream, CHAT)),
            "Complete": (unary, partial(self._answer_unary, COMPLETE)),
            "StreamComplete": (stream, partial(self._answer_stream, COMPLETE)),
            "Resume": (stream, self._resume),
            "Embed": (stream, self._answer_pooling),  # a stream of one answer, which is written as the client reads
            "Rerank": (stream, self._answer_pooling),
            "Tokenize": (unary, lambda request, context, meta: self._tokenize(request, meta)),
            "Detokenize": (unary, lambda request, context, meta: self._detokenize(request, meta)),
            "ListModels": (unary, lambda request, context, meta: self._list_models(request, meta)),
            "GetModel": (unary, lambda request, context, meta: self._get_model(request, meta)),
        }
        handlers = {name: make(self._guarded(method, name), **codecs) for name, (make, method) in methods.items()}
        handlers["Session"] = grpc.stream_stream_rpc_method_handler(self._session, **codecs)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def admit(self, call: Any) -> str | None:
        """Authenticate a call before its messages are read. Returns the tenant's name, or None for health checks and
        reflection, which need no credentials. Implements rpc.server.Gate."""
        if not call.path.startswith(f"/{SERVICE}/"):
            return None
        authenticator, before = self._service.authenticator, call.caller
        try:
            snapshot, now = authenticator.knows(), self._service.clock()
            if before is not None and before.snapshot is snapshot and now - before.at < RECHECK_S:
                return str(before.principal.tenant.name)
            principal = await authenticator.principal(self._credentials(call))
        except CallError as error:
            await self._abort(call, self._meta(call), error)
            raise
        call.caller = AdmittedCaller(principal, snapshot, now)
        if principal is not DEFAULT_PRINCIPAL:
            call.connection.mark_authenticated()
        return str(principal.tenant.name)

    async def _session(self, request_iterator: object, context: Any) -> None:
        """Serve a session. The caller is authenticated when the session starts, and again periodically and whenever
        tenants or keys change."""
        authenticator = self._service.authenticator
        try:
            caller = await authenticator.register(self._credentials(context))
        except CallError as error:
            await self._abort(context, self._meta(context), error)
            return
        try:
            meta = self._meta(context)
            trace = (meta.traceparent, meta.trace_state)
            await SessionStream(self._service, context, caller, trace, self._session_age_s).run()
        finally:
            authenticator.unregister(caller)

    def _guarded(
        self,
        method: Callable[[Any, Any, CallMeta], Awaitable[Message | bytes | None]],
        name: str,
    ) -> Callable[[Any, Any], Any]:
        """Wrap a method in a handler, which counts and decodes the request and maps errors to gRPC statuses. `admit`
        has authenticated the call before the handler runs."""

        async def handle(data: bytes, context: Any) -> Message | bytes | None:
            meta = self._meta(context, context.caller.principal)
            try:
                if name not in UNCOUNTED:
                    await self._service.count(meta)
                with CallFields(meta.log_fields):
                    request = await self._bodies.message(
                        name, data, meta.tenant, partial(self._service.tokenization.longest_context, meta.principal)
                    )
                    meta.release_body = context.request.release
                    context.set_trailing_metadata((("x-request-id", meta.request_id),))
                    return await method(request, context, meta)
            except CallError as error:
                await self._abort(context, meta, error)
            except (grpc.aio.AbortError, grpc.aio.UsageError):
                raise
            except Exception:  # callers get no traceback; the log has it under the request id
                log.exception("request.failed", **meta.log_fields)
                unexpected = CallError(Outcome.INTERNAL, f"unexpected failure; quote request id {meta.request_id}")
                await self._abort(context, meta, unexpected)
            return None

        return handle

    async def _abort(self, context: Any, meta: CallMeta, error: CallError) -> None:
        metadata = (*trailers(error), ("x-request-id", meta.request_id))
        await context.abort(grpc_code(error), error.message, metadata)

    def _credentials(self, context: Any) -> Credentials:
        """Return the credentials that the caller presents."""
        metadata = context.invocation_metadata() or ()
        authorization = tuple(str(value) for key, value in metadata if key == "authorization")
        names = alternative_names(context.peer_certificate()) if self._service.authenticator.by_certificate else ()
        return Credentials(authorization, names, context.peer())

    def _meta(self, context: Any, principal: Principal = DEFAULT_PRINCIPAL) -> CallMeta:
        own_id = trace = state = ""
        for key, value in context.invocation_metadata() or ():
            if key == "x-request-id":
                own_id = request_id(value) or own_id
            elif key == "traceparent":
                trace = traceparent(value) or trace
            elif key == "tracestate":
                state = trace_state(value) or state
        remaining_s = context.time_remaining()
        deadline = None if remaining_s is None else self._service.clock() + remaining_s
        return CallMeta(own_id or random_id(), "grpc", deadline, trace, state if trace else "", principal)

    # ---- calls

    async def _resume(self, resumed: ResumedCall, context: Any, meta: CallMeta) -> None:
        await self._answer_stream(CHAT if resumed.is_chat else COMPLETE, resumed.request, context, meta)

    async def _answer_stream(self, kind: Kind, request: GenerationRequest, context: Any, meta: CallMeta) -> None:
        async with self._service.open(request, meta) as call:
            await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            if self._delivery is None:
                self._delivery = ChunkDelivery(self._service.unread_answers)
            encoder = encoder_for(kind, call, self._service.keepalives.progress)
            if call.is_resumed:
                context.send(encoder.begin())
            await StreamWriter(call, encoder, context, self._delivery).run()

    async def _answer_unary(
        self, kind: Kind, request: GenerationRequest, context: Any, meta: CallMeta
    ) -> Message | None:
        if request.options.logprobs is not None:
            await self._answer_with_logprobs(kind, request, context, meta)
            return None
        async with self._service.open(request, meta) as call:
            pieces = await call.output.all_pieces()
            await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            response = kind.response(call, pieces)
        if (size := response.ByteSize()) <= LARGE_BYTES:
            return response
        with self._service.unread_answers.answer(meta.tenant, copies=2) as unread:
            await unread.hold(size)
            await context.write_parts([response.SerializeToString()])
        return None

    async def _answer_with_logprobs(self, kind: Kind, request: GenerationRequest, context: Any, meta: CallMeta) -> None:
        with self._service.unread_answers.answer(meta.tenant) as unread:
            async with self._service.open(request, meta, unread) as call:
                whole = WholeAnswer(call, codec.MessageLogprobs, unread)
                await whole.gather()
                await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            # The call has released its slots by now, so a client that reads slowly holds no slot.
            parts = codec.response_with_logprobs(kind.response(call, whole.pieces), whole.logprobs)
            del whole
            await context.write_parts(parts)

    async def _answer_pooling(self, parsed: ParsedPooling, context: Any, meta: CallMeta) -> None:
        with self._service.unread_answers.answer(meta.tenant) as unread:
            async with self._service.open_pooling(parsed.request, meta, unread) as call:
                vectors = await call.vectors()
                await context.send_initial_metadata((("x-request-id", meta.request_id), *call.headers))
            # The call has released its slots by now, so a client that reads slowly holds no slot.
            await context.write_parts(await pooling_response(call, vectors, parsed))

    # ---- tokens and models

    async def _tokenize(self, request: TokenizeCall, meta: CallMeta) -> pb.TokenizeResponse:
        ids, max_model_len = await self._service.tokenization.tokenize(request.model, request.prompt, meta)
        return pb.TokenizeResponse(token_ids=ids, max_model_len=max_model_len)

    async def _detokenize(self, request: DetokenizeCall, meta: CallMeta) -> pb.DetokenizeResponse:
        text = await self._service.tokenization.detokenize(request.model, request.token_ids, meta)
        return pb.DetokenizeResponse(text=text)

    async def _list_models(self, request: pb.ListModelsRequest, meta: CallMeta) -> pb.ListModelsResponse:
        directory, principal = self._service.directory, meta.principal
        known = {target.name: target for target in directory.lookup.targets_of(principal)}
        page, token = paginate(list(known), request.page_size, request.page_token)
        models = await in_slices(_model_pb(directory, known[name], principal) for name in page)
        return pb.ListModelsResponse(models=models, next_page_token=token)

    async def _get_model(self, request: pb.GetModelRequest, meta: CallMeta) -> pb.Model:
        directory = self._service.directory
        return _model_pb(directory, directory.lookup.target(request.name, meta.principal), meta.principal)


def _model_pb(directory: ModelDirectory, target: Target, principal: Principal) -> pb.Model:
    adapters = [] if target.adapter else [spec.name for spec in target.model.access.adapters_of(principal)]
    return codec.model_pb(target, directory.lookup.aliases(target.model, principal), adapters)


def paginate(names: Sequence[str], page_size: int, page_token: str) -> tuple[Sequence[str], str]:
    """Return one page of sorted names, and the token of the next page (AIP-158). Raises CallError for a negative
    `page_size` or an invalid `page_token`."""
    if page_size < 0:
        raise invalid("page_size", f"must not be negative, got {page_size}")
    after = _after(page_token) if page_token else ""
    rest = [name for name in names if name > after] if after else list(names)
    size = min(page_size or MAX_PAGE_SIZE, MAX_PAGE_SIZE)
    page = rest[:size]
    more = json.dumps({"after": page[-1]}).encode().hex() if len(rest) > size else ""
    return page, more


def _after(page_token: str) -> str:
    """Return the name that a page token holds. The page begins after this name. Raises CallError for an invalid
    token."""
    try:
        after = json.loads(bytes.fromhex(page_token[:MAX_PAGE_TOKEN]))["after"]
    except (ValueError, KeyError, TypeError, RecursionError):
        after = None
    if not isinstance(after, str):
        raise invalid("page_token", "is not one that this method has returned")
    return after
