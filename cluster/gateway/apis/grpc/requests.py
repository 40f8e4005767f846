"""Parsing of inference.proto requests into generation requests. Each error names the path of the wrong field."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import DecodeError, Message

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import CallError, Outcome, invalid, quoted
from cluster.api.types import Grammar
from cluster.gateway.apis.grpc.messages import (
    check_count,
    check_messages,
    choice_of,
    json_object,
    messages_of,
    tools_of,
)
from cluster.gateway.apis.request_ids import request_id, trace_state, traceparent
from cluster.gateway.calls.pooling.pooling_request import (
    WHOLE_CONTEXT,
    IdsInputs,
    InputField,
    PairInputs,
    ParsedPooling,
    PoolingInputs,
    PoolingRequest,
    TextInputs,
)
from cluster.gateway.calls.pooling.pooling_request import check_count as check_inputs
from cluster.gateway.calls.request import (
    DEFAULT_COMPLETE_TOKENS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_METADATA,
    MAX_NAME_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    ChatPrompt,
    GenerationRequest,
    IdsPrompt,
    Prompt,
    RequestOptions,
    ResumeFrom,
    TextPrompt,
)
from cluster.gateway.calls.tools import check_effort, output_options, template_arguments
from cluster.v1 import inference_pb2 as pb

MAX_BATCHED_REQUESTS = 1000
"""Upper bound on the number of requests in the field `more` of one session message."""
MAX_PAGE_TOKEN = 8192
MAX_SMALL_BYTES = 65_536
"""Upper bound in bytes on a request of a method whose RequestReader names an `only_field`. A longer request is refused
before it is parsed."""


def decoded(kind: type[Message], data: bytes | bytearray) -> Any:
    """Decode a message. Raises CallError."""
    try:
        return kind.FromString(data)  # type: ignore[arg-type] # any buffer will do
    except DecodeError as error:
        raise invalid("request", f"is not a message of this method: {error}") from None


def parse_chat(request: pb.ChatRequest, is_whole: bool = False) -> GenerationRequest:
    """Parse a ChatRequest. `is_whole`: whether the caller gets the answer as a whole instead of as a stream. Raises
    CallError."""
    check_name(request.model)
    given = _given(request)
    options = _options(given)
    check_messages(request.messages)
    check_effort(request.reasoning_effort)
    tools = tools_of(request.tools)
    choice = choice_of(request.tool_choice, tools)
    text = request.chat_template_kwargs_json
    arguments = template_arguments(
        json_object("chat_template_kwargs_json", text) if text else {}, request.reasoning_effort
    )
    resumes = request.continue_final_message
    prompt = ChatPrompt(messages_of(request.messages), arguments, continue_final_message=resumes, tools=tools)
    output = output_options(
        prompt,
        choice,
        parallel_tool_calls=given.get("parallel_tool_calls", True),
        reasoning_effort=request.reasoning_effort,
        is_whole=is_whole,
    )
    return GenerationRequest(
        request.model,
        prompt,
        options,
        metadata=dict(request.metadata),
        resumable=_request_digest(request),
        output=output,
        priority_class=request.priority,
        affinity_key=request.affinity_key,
    )


def parse_whole_chat(request: pb.ChatRequest) -> GenerationRequest:
    """Parse a ChatRequest of the method Chat. Raises CallError."""
    return parse_chat(request, is_whole=True)


def parse_complete(request: pb.CompleteRequest) -> GenerationRequest:
    """Parse a CompleteRequest. Raises CallError."""
    check_name(request.model)
    options = options_of(request)
    prompt: Prompt
    if request.prompt_token_ids:
        if request.prompt:
            raise invalid("prompt_token_ids", "give either prompt or prompt_token_ids, not both")
        prompt = IdsPrompt(request.prompt_token_ids[:])
    elif request.prompt:
        prompt = TextPrompt(request.prompt)
    else:
        raise invalid("prompt", "must not be empty; give prompt or prompt_token_ids")
    return GenerationRequest(
        request.model,
        prompt,
        options,
        DEFAULT_COMPLETE_TOKENS,
        metadata=dict(request.metadata),
        resumable=_request_digest(request),
        priority_class=request.priority,
        affinity_key=request.affinity_key,
    )


def parse_resume(request: pb.ResumeRequest) -> GenerationRequest:
    """Parse a ResumeRequest. The result is the request that began the stream, with the resume tokens and the offset
    added. Raises CallError."""
    kind = request.WhichOneof("call")
    if kind is None:
        raise invalid("call", "must be chat or complete: the request that began the stream")
    began = parse_chat(request.chat) if kind == "chat" else parse_complete(request.complete)
    return replace(began, resume=ResumeFrom(request.resume_tokens[:], request.offset))


def _request_digest(request: pb.ChatRequest | pb.CompleteRequest) -> str:
    """Return the digest of a whole request. Returns "" for a request that is not resumable, since only resumable
    requests need a digest."""
    if not request.resumable:
        return ""
    name = request.DESCRIPTOR.name.encode()
    return hashlib.sha256(name + b"\0" + request.SerializeToString(deterministic=True)).hexdigest()


@dataclass(frozen=True, slots=True)
class ResumedCall:
    """A parsed ResumeRequest."""

    is_chat: bool
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """A parsed TokenizeRequest."""

    model: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class DetokenizeCall:
    """A parsed DetokenizeRequest."""

    model: str
    token_ids: Sequence[int]


@frozen_dataclass
class SessionStart:
    """The start of a call in a session. `request`: the parsed request, or the error that parsing raised."""

    call_id: int
    is_chat: bool
    request: GenerationRequest | ParsedPooling | CallError
    deadline_ms: int
    request_id: str
    traceparent: str
    trace_state: str


@dataclass(frozen=True, slots=True)
class SessionCancel:
    """The cancellation of a call in a session."""

    call_id: int


def parse_embed(request: pb.EmbedRequest) -> ParsedPooling:
    """Parse an EmbedRequest. Raises CallError."""
    check_name(request.model)
    inputs: PoolingInputs
    if request.token_ids:
        if request.texts:
            raise invalid("token_ids", "give either texts or token_ids, not both")
        check_inputs("token_ids", len(request.token_ids))
        inputs = IdsInputs([one.ids[:] for one in request.token_ids], InputField("token_ids", inner=".ids"))
    else:
        check_inputs("texts", len(request.texts))
        inputs = TextInputs(request.texts[:], InputField("texts"))
    dimensions = request.dimensions if request.HasField("dimensions") else None
    return ParsedPooling(_pooling(request, inputs, dimensions))


def parse_rerank(request: pb.RerankRequest) -> ParsedPooling:
    """Parse a RerankRequest. Raises CallError."""
    check_name(request.model)
    if request.top_n < 0:
        raise invalid("top_n", f"must be at least 0 (0: all documents), got {request.top_n}")
    check_inputs("documents", len(request.documents))
    pairs = PairInputs([request.query], request.documents[:], InputField("query", False), InputField("documents"))
    return ParsedPooling(_pooling(request, pairs), top_n=request.top_n, returns_documents=request.return_documents)


def _pooling(
    request: pb.EmbedRequest | pb.RerankRequest, inputs: PoolingInputs, dimensions: int | None = None
) -> PoolingRequest:
    check_count("metadata", request.metadata, MAX_METADATA, "entries")
    return PoolingRequest(
        request.model,
        inputs,
        dimensions,
        truncate_tokens=WHOLE_CONTEXT if request.truncate else None,
        metadata=dict(request.metadata),
        priority_class=request.priority,
        affinity_key=request.affinity_key,
    )


def resume_call(request: pb.ResumeRequest) -> ResumedCall:
    """Parse a ResumeRequest of the method Resume. Raises CallError."""
    return ResumedCall(request.HasField("chat"), parse_resume(request))


def tokenize_call(request: pb.TokenizeRequest) -> TokenizeCall:
    """Parse a TokenizeRequest. Raises CallError."""
    check_name(request.model)
    if bool(request.text) == bool(request.messages):
        raise invalid("text", "give either text or messages")
    if request.text:
        if request.tools:
            raise invalid("tools", "need messages: give messages instead of text")
        return TokenizeCall(request.model, TextPrompt(request.text))
    check_messages(request.messages)
    prompt = ChatPrompt(messages_of(request.messages), tools=tools_of(request.tools))
    return TokenizeCall(request.model, prompt)


def detokenize_call(request: pb.DetokenizeRequest) -> DetokenizeCall:
    """Parse a DetokenizeRequest. Raises CallError."""
    check_name(request.model)
    return DetokenizeCall(request.model, request.token_ids[:])


_SESSION_PARSERS: Mapping[str, Callable[[Any], GenerationRequest | ParsedPooling]] = {
    "chat": parse_chat,
    "complete": parse_complete,
    "resume": parse_resume,
    "embed": parse_embed,
    "rerank": parse_rerank,
}


def session_items(request: pb.SessionRequest) -> Iterator[SessionStart | SessionCancel]:
    """Yield the calls that a message of a session starts and cancels, in order. Raises CallError."""
    if len(request.more) > MAX_BATCHED_REQUESTS:
        raise invalid("more", f"holds {len(request.more)} requests; at most {MAX_BATCHED_REQUESTS} fit in one message")
    for item in (request, *request.more):
        if item.HasField("start"):
            yield _session_call(item.start)
        elif item.HasField("cancel"):
            yield SessionCancel(item.cancel.call_id)


def _session_call(start: pb.SessionStart) -> SessionStart:
    kind = start.WhichOneof("call")
    request: GenerationRequest | ParsedPooling | CallError
    if kind is None:
        request = invalid("start", "must hold chat, complete, resume, embed or rerank")
    else:
        try:
            request = _SESSION_PARSERS[kind](getattr(start, kind))
        except CallError as error:
            request = error
    is_chat = start.resume.HasField("chat") if kind == "resume" else kind == "chat"
    ids = request_id(start.request_id), traceparent(start.traceparent), trace_state(start.tracestate)
    return SessionStart(start.call_id, is_chat, request, start.deadline_ms, *ids)


@dataclass(frozen=True, slots=True)
class RequestReader:
    """The request type of a gRPC method, and the parser of the method's requests."""

    kind: type[Message]
    read: Callable[[Any], Any]
    only_field: str = ""
    """The only field that can make a request longer than MAX_SMALL_BYTES; the error for such a request names this
    field. "" if requests of the method may be longer."""


def check_name(name: str) -> None:
    """Raise CallError if a model name is longer than the name of any model can be."""
    if len(name) > MAX_NAME_CHARS:
        raise CallError(Outcome.MODEL_NOT_FOUND, f"model {quoted(name)} does not exist")


def _list_models(request: pb.ListModelsRequest) -> pb.ListModelsRequest:
    if len(request.page_token) > MAX_PAGE_TOKEN:
        raise invalid("page_token", "is not one that this method has returned")
    return request


def _get_model(request: pb.GetModelRequest) -> pb.GetModelRequest:
    check_name(request.name)
    return request


READ: Mapping[str, RequestReader] = {
    "Chat": RequestReader(pb.ChatRequest, parse_whole_chat),
    "StreamChat": RequestReader(pb.ChatRequest, parse_chat),
    "Complete": RequestReader(pb.CompleteRequest, parse_complete),
    "StreamComplete": RequestReader(pb.CompleteRequest, parse_complete),
    "Resume": RequestReader(pb.ResumeRequest, resume_call),
    "Embed": RequestReader(pb.EmbedRequest, parse_embed),
    "Rerank": RequestReader(pb.RerankRequest, parse_rerank),
    "Tokenize": RequestReader(pb.TokenizeRequest, tokenize_call),
    "Detokenize": RequestReader(pb.DetokenizeRequest, detokenize_call),
    "ListModels": RequestReader(pb.ListModelsRequest, _list_models, "page_token"),
    "GetModel": RequestReader(pb.GetModelRequest, _get_model, "name"),
}


def options_of(request: pb.ChatRequest | pb.CompleteRequest) -> RequestOptions:
    """Parse the sampling options of a request. Raises CallError."""
    return _options(_given(request))


def _given(request: pb.ChatRequest | pb.CompleteRequest) -> Mapping[str, Any]:
    """Return the values of the fields that are set in a request, keyed by name. Reading only the set fields is cheaper
    than reading all, because few are set."""
    return {field.name: value for field, value in request.ListFields()}


def _options(given: Mapping[str, Any]) -> RequestOptions:
    _check_counts(given)
    get = given.get
    logprobs, top = None, get("top_logprobs")
    if get("logprobs"):
        logprobs = top or 0
    elif top is not None and top != 0:
        raise invalid("top_logprobs", "needs logprobs to be true" if top > 0 else f"must be at least 0, got {top}")
    return RequestOptions(
        max_tokens=get("max_tokens"),
        min_tokens=get("min_tokens"),
        temperature=get("temperature"),
        top_p=get("top_p"),
        top_k=get("top_k"),
        min_p=get("min_p"),
        seed=get("seed"),
        stop=tuple(get("stop", ())),
        stop_token_ids=tuple(get("stop_token_ids", ())),
        n=get("n", 1),
        frequency_penalty=get("frequency_penalty"),
        presence_penalty=get("presence_penalty"),
        repetition_penalty=get("repetition_penalty"),
        logit_bias=dict(get("logit_bias", ())),
        logprobs=logprobs,
        ignore_eos=get("ignore_eos", False),
        grammar=_grammar(given["response_format"]) if "response_format" in given else None,
        max_reasoning_tokens=get("max_reasoning_tokens"),
    )


_COUNTED = (
    ("stop", MAX_STOP_STRINGS, "strings"),
    ("stop_token_ids", MAX_STOP_TOKEN_IDS, "token ids"),
    ("logit_bias", MAX_LOGIT_BIAS, "entries"),
    ("metadata", MAX_METADATA, "entries"),
)


def _check_counts(given: Mapping[str, Any]) -> None:
    """Check the lengths of list fields before the elements are read. Raises CallError."""
    for name, most, what in _COUNTED:
        if name in given:
            check_count(name, given[name], most, what)
    if "response_format" in given:
        check_count("response_format.choice", given["response_format"].choice, MAX_CHOICES, "strings")


def _grammar(f: pb.ResponseFormat) -> Grammar | None:
    match f.type:
        case "" | "text":
            return None
        case "json_object":
            return Grammar("json_object", "")
        case "json_schema":
            json_object("response_format.json_schema", f.json_schema)
            return Grammar("json_schema", f.json_schema)
        case "regex":
            return Grammar("regex", f.regex)
        case "choice":
            return Grammar("choice", tuple(f.choice))
        case "grammar":
            return Grammar("grammar", f.grammar)
        case other:
            known = "text, json_object, json_schema, regex, choice or grammar"
            raise invalid("response_format.type", f"must be {known}, got {quoted(other)}")
