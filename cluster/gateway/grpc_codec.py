"""Between inference.proto and wishes, pieces and usage: field by field, with the path of what is wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from cluster.api.outcomes import CallError, Outcome, Violation, invalid, quoted
from cluster.api.types import Grammar
from cluster.gateway.call import Call, CallUsage
from cluster.gateway.directory import KnownModel
from cluster.gateway.json_values import parse
from cluster.gateway.output import Piece
from cluster.gateway.service import Progress
from cluster.gateway.text.logprobs import TokenLogprob
from cluster.gateway.wishes import (
    DEFAULT_COMPLETE_TOKENS,
    ChatPrompt,
    IdsPrompt,
    Options,
    Prompt,
    ResumeFrom,
    TextPrompt,
    Wish,
)
from cluster.v1 import inference_pb2 as pb

ROLES = ("system", "developer", "user", "assistant", "tool")


def unsupported(field: str, what: str) -> CallError:
    """A field that this release knows and does not serve."""
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"{field}: {what} not in this release; leave it out",
        violations=[Violation(field, "not supported")],
    )


# ---- requests


def chat_wish(request: pb.ChatRequest) -> Wish:
    """Raises CallError."""
    if request.tools:
        raise unsupported("tools", "tool calls are")
    if request.HasField("tool_choice") and request.tool_choice.mode not in ("", "none", "auto"):
        raise unsupported("tool_choice", "tool calls are")
    if request.HasField("max_reasoning_tokens"):
        raise unsupported("max_reasoning_tokens", "reasoning limits are")
    if not request.messages:
        raise invalid("messages", "must not be empty")
    kwargs = dict(_template_kwargs(request.chat_template_kwargs_json))
    if request.reasoning_effort:
        kwargs.setdefault("reasoning_effort", request.reasoning_effort)
    prompt = ChatPrompt(
        messages=[_message(i, message) for i, message in enumerate(request.messages)],
        template_kwargs=kwargs,
        continue_final_message=request.continue_final_message,
    )
    return Wish(
        request.model, prompt, _options(request), metadata=dict(request.metadata), resumable=_request_digest(request)
    )


def complete_wish(request: pb.CompleteRequest) -> Wish:
    """Raises CallError."""
    prompt: Prompt
    if request.prompt_token_ids:
        if request.prompt:
            raise invalid("prompt_token_ids", "give either prompt or prompt_token_ids, not both")
        prompt = IdsPrompt(tuple(request.prompt_token_ids))
    elif request.prompt:
        prompt = TextPrompt(request.prompt)
    else:
        raise invalid("prompt", "must not be empty; give prompt or prompt_token_ids")
    return Wish(
        request.model,
        prompt,
        _options(request),
        DEFAULT_COMPLETE_TOKENS,
        metadata=dict(request.metadata),
        resumable=_request_digest(request),
    )


def resume_wish(request: pb.ResumeRequest) -> Wish:
    """Raises CallError."""
    kind = request.WhichOneof("call")
    if kind is None:
        raise invalid("call", "must be chat or complete: the request that began the stream")
    wish = chat_wish(request.chat) if kind == "chat" else complete_wish(request.complete)
    return replace(wish, resume=ResumeFrom(request.resume_tokens, request.offset))


def _request_digest(request: pb.ChatRequest | pb.CompleteRequest) -> str:
    """Of all that the caller asks for; "" where the stream is not to be resumed, which costs nothing then."""
    if not request.resumable:
        return ""
    name = request.DESCRIPTOR.name.encode()
    return hashlib.sha256(name + b"\0" + request.SerializeToString(deterministic=True)).hexdigest()


def tokenize_prompt(request: pb.TokenizeRequest) -> Prompt:
    """Raises CallError."""
    if bool(request.text) == bool(request.messages):
        raise invalid("text", "give either text or messages")
    if request.text:
        return TextPrompt(request.text)
    return ChatPrompt([_message(i, message) for i, message in enumerate(request.messages)])


def _options(r: pb.ChatRequest | pb.CompleteRequest) -> Options:
    if r.priority:
        raise unsupported("priority", "priority classes are")

    def given(name: str) -> Any:
        return getattr(r, name) if r.HasField(name) else None  # type: ignore[arg-type]

    logprobs = None
    if r.logprobs or (given("top_logprobs") or 0) > 0:
        if not r.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        logprobs = r.top_logprobs
    elif given("top_logprobs") is not None and r.top_logprobs < 0:
        raise invalid("top_logprobs", f"must be at least 0, got {r.top_logprobs}")
    return Options(
        max_tokens=given("max_tokens"),
        min_tokens=given("min_tokens"),
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        min_p=given("min_p"),
        seed=given("seed"),
        stop=tuple(r.stop),
        stop_token_ids=tuple(r.stop_token_ids),
        n=r.n if r.HasField("n") else 1,
        frequency_penalty=given("frequency_penalty"),
        presence_penalty=given("presence_penalty"),
        repetition_penalty=given("repetition_penalty"),
        logit_bias=dict(r.logit_bias),
        logprobs=logprobs,
        ignore_eos=r.ignore_eos,
        grammar=_grammar(r.response_format) if r.HasField("response_format") else None,
    )


def _grammar(f: pb.ResponseFormat) -> Grammar | None:
    match f.type:
        case "" | "text":
            return None
        case "json_object":
            return Grammar("json_object", "")
        case "json_schema":
            _json_object("response_format.json_schema", f.json_schema)
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


def _template_kwargs(text: str) -> Mapping[str, Any]:
    return _json_object("chat_template_kwargs_json", text) if text else {}


def _json_object(field: str, text: str) -> dict[str, Any]:
    value = parse(field, text)
    if not isinstance(value, dict):
        raise invalid(field, "must be a JSON object")
    return value


def _message(index: int, message: pb.Message) -> dict[str, Any]:
    at = f"messages[{index}]"
    if message.role not in ROLES:
        raise invalid(f"{at}.role", f"must be one of {', '.join(ROLES)}; got {quoted(message.role)}")
    out: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.parts:
        if message.content:
            raise invalid(f"{at}.parts", "give either content or parts, not both")
        out["content"] = _joined(at, message.parts)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if value := getattr(message, name):
            out[name] = value
    if message.tool_calls:
        out["tool_calls"] = [_tool_call(f"{at}.tool_calls[{i}]", c) for i, c in enumerate(message.tool_calls)]
    return out


def _joined(at: str, parts: Sequence[pb.ContentPart]) -> str:
    """Text parts on lines of their own, as vLLM does for templates that take plain content."""
    texts = []
    for i, part in enumerate(parts):
        kind = part.WhichOneof("part")
        if kind == "image":
            raise unsupported(f"{at}.parts[{i}].image", "images are")
        if kind is None:
            raise invalid(f"{at}.parts[{i}]", "is empty; give text")
        texts.append(part.text)
    return "\n".join(texts)


def _tool_call(at: str, call: pb.ToolCall) -> dict[str, Any]:
    arguments = _json_object(f"{at}.arguments", call.arguments) if call.arguments else {}
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


# ---- answers


def usage_pb(usage: CallUsage) -> pb.Usage:
    """Counts and times of a call."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        queue_ms=int(usage.queue_s * 1000),
        ttft_ms=int(usage.ttft_s * 1000),
        resumed=usage.resumed,
    )


def logprobs_pb(logprobs: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    """Log probabilities with their alternatives."""
    return [
        pb.TokenLogprob(
            token_id=t.token_id,
            token=t.token,
            token_bytes=t.token_bytes,
            logprob=t.logprob,
            top_logprobs=logprobs_pb(t.top),
        )
        for t in logprobs
    ]


def chat_chunk(call: Call, pieces: Sequence[Piece], offset: int) -> pb.ChatChunk:
    """Pieces as a chunk; the last one carries usage."""
    return pb.ChatChunk(
        id=call.shown_id,
        model=call.model,
        offset=offset,
        choices=[
            pb.ChoiceDelta(
                index=piece.index,
                delta=pb.Message(role="assistant", content=piece.text)
                if piece.first
                else pb.Message(content=piece.text),
                finish_reason=piece.finish_reason,
                logprobs=logprobs_pb(piece.logprobs) if piece.logprobs else (),
            )
            for piece in pieces
        ],
        usage=usage_pb(call.usage) if call.told else None,
    )


def chat_text(head: bytes, text: str, offset: int) -> bytes:
    """A ChatChunk of choice 0 with text alone, serialized by hand; `head` is the serialized id and model.

    The token path's common message. Built from protobuf objects it costs four times as much (docs/performance.md).
    """
    data = text.encode()
    size = len(data)
    start = _DELTA[size] if size < len(_DELTA) else _delta(size)
    return head + start + data + (_OFFSET[offset] if offset < len(_OFFSET) else b"\x28" + _varint(offset))


def complete_text(head: bytes, text: str, offset: int) -> bytes:
    """A CompleteChunk of choice 0 with text alone, likewise."""
    data = text.encode()
    choice = b"\x12" + _varint(len(data)) + data  # CompleteChoice.text
    return head + b"\x1a" + _varint(len(choice)) + choice + b"\x28" + _varint(offset)


def empty_chunk(head: bytes, offset: int) -> bytes:
    """A serialized ChatChunk or CompleteChunk without choices, likewise."""
    return head + b"\x28" + _varint(offset)


def with_token(chunk: bytes, token: bytes, whole: bool) -> bytes:
    """A serialized ChatChunk or CompleteChunk with its resume_token, and resume_token_whole."""
    return chunk + b"\x32" + _varint(len(token)) + (token + b"\x40\x01" if whole else token)


def resumed(is_chat: bool, chunk: bytes) -> bytes:
    """A ResumeChunk of a serialized chunk."""
    return (b"\x0a" if is_chat else b"\x12") + _varint(len(chunk)) + chunk


def event_chunk(call_id: int, is_chat: bool, chunk: bytes) -> bytes:
    """A SessionEvent of a serialized chunk, as an element of SessionEvents."""
    head = b"\x08" + _varint(call_id) if call_id else b""
    body = head + (b"\x1a" if is_chat else b"\x22") + _varint(len(chunk)) + chunk
    return b"\x0a" + _varint(len(body)) + body


def event_head(call_id: int) -> bytes:
    """A session's call as the beginning of each of its events, for `event_text`."""
    return (b"\x08" + _varint(call_id) if call_id else b"") + b"\x12"  # call_id, then the tag of text


def event_text(head: bytes, text: str) -> bytes:
    """A SessionEvent with text alone, as an element of SessionEvents, serialized by hand."""
    data = text.encode()
    size = len(data)
    length = len(head) + size
    if length < 127:
        return b"\x0a" + _SMALL[length + 1] + head + _SMALL[size] + data
    body = head + _varint(size) + data
    return b"\x0a" + _varint(len(body)) + body


def event(message: pb.SessionEvent) -> bytes:
    """Any SessionEvent, as an element of SessionEvents."""
    data = message.SerializeToString()
    return b"\x0a" + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    if value < 128:
        return _SMALL[value]
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = [bytes([value]) for value in range(128)]


def _delta(size: int) -> bytes:
    """All that stands before a text of so many bytes: ChatChunk.choices, ChoiceDelta.delta and Message.content."""
    content = b"\x12" + _varint(size)
    delta = b"\x12" + _varint(len(content) + size) + content
    return b"\x1a" + _varint(len(delta) + size) + delta


_DELTA = [_delta(size) for size in range(512)]
_OFFSET = [b"\x28" + _varint(offset) for offset in range(4096)]


def complete_chunk(call: Call, pieces: Sequence[Piece], offset: int) -> pb.CompleteChunk:
    """Pieces as a chunk; the last one carries usage."""
    return pb.CompleteChunk(
        id=call.shown_id,
        model=call.model,
        offset=offset,
        choices=_choices(pieces),
        usage=usage_pb(call.usage) if call.told else None,
    )


def _choices(pieces: Sequence[Piece]) -> list[pb.CompleteChoice]:
    return [
        pb.CompleteChoice(
            index=p.index,
            text=p.text,
            finish_reason=p.finish_reason,
            logprobs=logprobs_pb(p.logprobs) if p.logprobs else (),
        )
        for p in pieces
    ]


def chat_response(call: Call, pieces: Sequence[Piece]) -> pb.ChatResponse:
    """A whole answer; one piece for each choice."""
    return pb.ChatResponse(
        id=call.shown_id,
        model=call.model,
        created=_now(),
        choices=[
            pb.Choice(
                index=p.index,
                message=pb.Message(role="assistant", content=p.text),
                finish_reason=p.finish_reason,
                logprobs=logprobs_pb(p.logprobs),
            )
            for p in pieces
        ],
        usage=usage_pb(call.usage),
    )


def complete_response(call: Call, pieces: Sequence[Piece]) -> pb.CompleteResponse:
    """A whole answer; one piece for each choice."""
    return pb.CompleteResponse(
        id=call.shown_id, model=call.model, created=_now(), choices=_choices(pieces), usage=usage_pb(call.usage)
    )


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def progress_pb(progress: Progress) -> pb.Progress:
    """Where a silent call is."""
    return pb.Progress(
        state=progress.state,
        queue_position=progress.queue_position,
        fraction=progress.fraction,
        eta_ms=min(int(progress.eta_s * 1000), (1 << 31) - 1),
    )


def model_pb(model: KnownModel, aliases: Sequence[str]) -> pb.Model:
    """A model as ListModels shows it, with its other names for the caller."""
    entry = model.entry
    link = next(iter(model.links.values()), None)
    return pb.Model(
        name=entry.name,
        aliases=aliases,
        family=entry.family,
        version=entry.version,
        revision=entry.revision,
        weight_digest=link.identity.weight_digest if link else next(iter(entry.weight_digests), ""),
        license=entry.license,
        max_model_len=model.max_model_len,
        capabilities=link.info.capabilities if link else (),
        state=pb.Model.State.Value(f"STATE_{model.state.value}"),
        state_reason="" if link else entry.state_reason,
    )
