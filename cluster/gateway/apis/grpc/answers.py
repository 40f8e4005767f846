"""Encoding of output pieces, usage, progress and models as messages of inference.proto."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from cluster.api.output_parts import PartKind
from cluster.api.pooling import pooling_capabilities
from cluster.api.types import RESUME_CAPABILITIES, weakest_resume_capability
from cluster.gateway.apis.pooling_scores import Ranked
from cluster.gateway.apis.whole_logprobs import ChoiceLogprobs, EncodedList
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.keepalive import CallProgress
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.tool_call_ids import id_in_answer
from cluster.gateway.models.target import Target
from cluster.gateway.text.logprobs import TokenLogprob
from cluster.v1 import inference_pb2 as pb


def usage_pb(usage: CallUsage) -> pb.Usage:
    """Return the token counts and times of a call as a Usage message."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        queue_ms=int(usage.queue_s * 1000),
        ttft_ms=int(usage.ttft_s * 1000),
        resumed=usage.resumed,
        resume=usage.resume.removeprefix("resume:"),
    )


def logprobs_pb(logprobs: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    """Return log probabilities as messages. The alternatives at a token's position are in `top_logprobs`."""
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


def message_pb(call: Call, piece: Piece, role: str) -> pb.Message:
    """Return an output piece as a Message: the delta of a streamed answer, or the whole message of a complete
    answer."""
    message = pb.Message(role=role, content=piece.text)
    for part in piece.parts:
        if part.kind is PartKind.REASONING:
            message.reasoning_content += part.text
        elif part.kind is PartKind.TOOL_NAME:
            tool_id = id_in_answer(call, piece.index, part.call, part.text)
            message.tool_calls.add(index=part.call, id=tool_id, name=part.text)
        elif part.kind is PartKind.TOOL_ARGUMENTS:
            last = message.tool_calls[-1] if message.tool_calls else None
            if last is None or last.index != part.call:
                last = message.tool_calls.add(index=part.call)
            last.arguments += part.text
    return message


def chat_chunk(call: Call, pieces: Sequence[Piece], offset: int) -> pb.ChatChunk:
    """Return output pieces as a ChatChunk. The last chunk of a call carries the usage of the call. `offset`: number of
    the chunk in the stream."""
    return pb.ChatChunk(
        id=call.shown_id,
        model=call.shown_model,
        offset=offset,
        choices=[
            pb.ChoiceDelta(
                index=piece.index,
                delta=message_pb(call, piece, "assistant" if piece.first else ""),
                finish_reason=piece.finish_reason,
                logprobs=logprobs_pb(piece.logprobs) if piece.logprobs else (),
            )
            for piece in pieces
        ],
        usage=usage_pb(call.usage) if call.output.end_delivered else None,
    )


def chat_text_start(size: int) -> bytes:
    """Return the bytes directly before the text in a serialized ChatChunk that holds only a text of choice 0: the tags
    and lengths of ChatChunk.choices, ChoiceDelta.delta and Message.content. `size`: size of the text in bytes.

    Chunks of text are serialized by hand because they are the most frequent messages. Building such a chunk from
    protobuf objects costs four times as much (docs/performance.md).
    """
    content = b"\x12" + varint(size)
    delta = b"\x12" + varint(len(content) + size) + content
    return b"\x1a" + varint(len(delta) + size) + delta


def complete_text_start(size: int) -> bytes:
    """Return the bytes that precede the text in a serialized CompleteChunk whose only content is a text of choice 0.
    These bytes are the tags and lengths of CompleteChunk.choices and CompleteChoice.text. `size`: size of the text in
    bytes."""
    text = b"\x12" + varint(size)
    return b"\x1a" + varint(len(text) + size) + text


def offset_field(offset: int) -> bytes:
    """Return the field `offset` of a serialized ChatChunk or CompleteChunk."""
    return OFFSETS[offset] if offset < len(OFFSETS) else b"\x28" + varint(offset)


def empty_chunk(head: bytes, offset: int) -> bytes:
    """Return a serialized ChatChunk or CompleteChunk without choices. `head`: the serialized fields `id` and
    `model`."""
    return head + offset_field(offset)


def with_token(chunk: bytes, token: bytes, whole: bool) -> bytes:
    """Return `chunk`, a serialized ChatChunk or CompleteChunk, with two fields appended: `token` as resume_token and
    `whole` as resume_token_whole."""
    return chunk + b"\x32" + varint(len(token)) + (token + b"\x40\x01" if whole else token)


def resumed(is_chat: bool, chunk: bytes) -> bytes:
    """Return a serialized ResumeChunk that holds `chunk`, a serialized ChatChunk if `is_chat`, else a CompleteChunk."""
    return (b"\x0a" if is_chat else b"\x12") + varint(len(chunk)) + chunk


def event_chunk(call_id: int, is_chat: bool, chunk: bytes) -> bytes:
    """Return a SessionEvent that holds `chunk`, a serialized ChatChunk if `is_chat`, else a CompleteChunk. The event is
    serialized as an element of SessionEvents."""
    head = b"\x08" + varint(call_id) if call_id else b""
    body = head + (b"\x1a" if is_chat else b"\x22") + varint(len(chunk)) + chunk
    return b"\x0a" + varint(len(body)) + body


def event_head(call_id: int) -> bytes:
    """Return the bytes with which every text event of a call in a session begins."""
    return (b"\x08" + varint(call_id) if call_id else b"") + b"\x12"  # call_id, then the tag of text


def text_event(head: bytes, text: str) -> tuple[bytes, bytes, bytes, bytes]:
    """Return a SessionEvent that holds only a text, serialized by hand as an element of SessionEvents. The event is
    returned in four parts, because the caller joins the parts of many events in one step. `head`: the result of
    `event_head`."""
    data = text.encode()
    size = len(data)
    length = len(head) + size
    if length < 127:
        return _ELEMENT[length], head, _SMALL[size], data
    prefix = varint(size)
    return b"\x0a" + varint(length + len(prefix)), head, prefix, data


def event(message: pb.SessionEvent) -> bytes:
    """Return a SessionEvent, serialized as an element of SessionEvents."""
    data = message.SerializeToString()
    return b"\x0a" + varint(len(data)) + data


def varint(value: int) -> bytes:
    """Return a number as a varint of protobuf."""
    if value < len(_SMALL):
        return _SMALL[value]
    return _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = [_varint(value) for value in range(2048)]
_ELEMENT = [b"\x0a" + bytes([length + 1]) for length in range(127)]
"""The tag and the length of an element of SessionEvents. Index: size of the element in bytes, not counting the byte
with the length of the text."""
OFFSETS = [b"\x28" + varint(offset) for offset in range(4096)]
CHAT_TEXT_STARTS = [chat_text_start(size) for size in range(512)]
COMPLETE_TEXT_STARTS = [complete_text_start(size) for size in range(512)]


def complete_chunk(call: Call, pieces: Sequence[Piece], offset: int) -> pb.CompleteChunk:
    """Return output pieces as a CompleteChunk. The last chunk of a call carries the usage of the call. `offset`: number
    of the chunk in the stream."""
    return pb.CompleteChunk(
        id=call.shown_id,
        model=call.shown_model,
        offset=offset,
        choices=_choices(pieces),
        usage=usage_pb(call.usage) if call.output.end_delivered else None,
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
    """Return a complete answer as a ChatResponse, without log probabilities. `pieces`: one piece for each choice."""
    return pb.ChatResponse(
        id=call.shown_id,
        model=call.shown_model,
        created=_now(),
        choices=[
            pb.Choice(
                index=p.index,
                message=message_pb(call, p, "assistant"),
                finish_reason=p.finish_reason,
            )
            for p in pieces
        ],
        usage=usage_pb(call.usage),
    )


class MessageLogprobs:
    """Encodes the log probabilities of one choice as the repeated field `logprobs` of a serialized Choice or
    CompleteChoice. Implements ChoiceLogprobs."""

    def __init__(self) -> None:
        self._fields = EncodedList()

    @property
    def size(self) -> int:
        """Approximate number of encoded bytes. Implements ChoiceLogprobs."""
        return self._fields.size

    def add(self, t: TokenLogprob) -> None:
        """Add the next token. Implements ChoiceLogprobs."""
        self._fields.add(pb.Choice(logprobs=logprobs_pb((t,))).SerializeToString())  # same bytes in CompleteChoice

    def parts(self) -> list[bytes | bytearray]:
        """Return the serialized fields, in parts. Implements ChoiceLogprobs."""
        return [*self._fields.blocks]


def response_with_logprobs(
    response: pb.ChatResponse | pb.CompleteResponse, logprobs: Sequence[ChoiceLogprobs]
) -> list[bytes | bytearray]:
    """Return a serialized response whose choices have log probabilities, in parts. `response`: the response without log
    probabilities. `logprobs`: the encoded log probabilities of each choice."""
    parts: list[bytes | bytearray] = []
    for choice, encoded in zip(response.choices, logprobs, strict=True):
        fields = [choice.SerializeToString(), *encoded.parts()]
        parts += [b"\x22", varint(sum(map(len, fields))), *fields]
    del response.choices[:]
    return [response.SerializeToString(), *parts]  # the order of fields in a message is free


def complete_response(call: Call, pieces: Sequence[Piece]) -> pb.CompleteResponse:
    """Return a complete answer as a CompleteResponse, without log probabilities. `pieces`: one piece for each
    choice."""
    return pb.CompleteResponse(
        id=call.shown_id, model=call.shown_model, created=_now(), choices=_choices(pieces), usage=usage_pb(call.usage)
    )


def embed_response(call: PoolingCall, vectors: list[bytes]) -> list[bytes | bytearray]:
    """Return an EmbedResponse in parts. The bytes of each vector are one, since protobuf encodes packed floats as the
    same little-endian float32 values. The list of vectors is emptied."""
    parts: list[bytes | bytearray] = [
        pb.EmbedResponse(id=call.id, model=call.model, created=_now()).SerializeToString()
    ]
    for index, vector in enumerate(vectors):
        head = (b"\x08" + varint(index) if index else b"") + b"\x12" + varint(len(vector))
        parts += [b"\x22" + varint(len(head) + len(vector)) + head, vector]
    vectors.clear()
    parts.append(pb.EmbedResponse(usage=usage_pb(call.usage)).SerializeToString())
    return parts


def rerank_response(call: PoolingCall, results: Sequence[Ranked]) -> bytes:
    """Return a RerankResponse."""
    response = pb.RerankResponse(id=call.id, model=call.model, created=_now(), usage=usage_pb(call.usage))
    response.results.extend(
        pb.RankedDocument(index=result.index, score=result.score, document=result.text or "") for result in results
    )
    return response.SerializeToString()


def event_answer(call_id: int, is_embed: bool, answer: Sequence[bytes | bytearray]) -> bytes:
    """Return a SessionEvent that holds `answer`, the parts of a serialized EmbedResponse if `is_embed`, else of a
    RerankResponse. The event is serialized as an element of SessionEvents."""
    size = sum(map(len, answer))
    head = (b"\x08" + varint(call_id) if call_id else b"") + (b"\x32" if is_embed else b"\x3a") + varint(size)
    return b"".join((b"\x0a", varint(len(head) + size), head, *answer))


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def progress_pb(progress: CallProgress) -> pb.Progress:
    """Return the progress of a call that has no output to send, as a Progress message."""
    return pb.Progress(
        state=progress.state,
        queue_position=progress.queue_position,
        fraction=progress.fraction,
        eta_ms=min(int(progress.eta_s * 1000), (1 << 31) - 1),
    )


def common_capabilities(each: Sequence[Sequence[str]]) -> Sequence[str]:
    """Return the capabilities that every worker of a model has, in the order of the first worker. The last element is
    the resume capability of the model: the weakest that any of its workers has. `each`: the capabilities of each
    worker."""
    first, *others = each or [()]
    words = [word for word in first if word not in RESUME_CAPABILITIES and all(word in other for other in others)]
    resume = weakest_resume_capability([word for words_of_worker in each for word in words_of_worker])
    return [*words, resume] if resume else words


def model_pb(target: Target, aliases: Sequence[str], adapters: Sequence[str]) -> pb.Model:
    """Return a model or adapter as a Model message. `aliases` and `adapters`: the aliases and adapters of the model
    that the caller may use."""
    model, entry = target.model, target.model.entry
    if target.adapter:
        return _adapter_pb(target)
    links = list(model.links.values())
    link = next(iter(links), None)
    capabilities = common_capabilities([worker.info.capabilities for worker in links])
    if link is None:
        capabilities = pooling_capabilities(sorted(model.capabilities.tasks or ()))
    return pb.Model(
        name=entry.name,
        aliases=aliases,
        family=entry.family,
        version=entry.version,
        revision=entry.revision,
        weight_digest=link.identity.weight_digest if link else next(iter(entry.weight_digests), ""),
        license=entry.license,
        max_model_len=model.capabilities.max_model_len,
        adapters=adapters,
        capabilities=capabilities,
        state=pb.Model.State.Value(f"STATE_{model.state.value}"),
        state_reason="" if link else entry.state_reason,
    )


def _adapter_pb(target: Target) -> pb.Model:
    model, spec = target.model, target.model.adapters.find(target.adapter)
    return pb.Model(
        name=target.name,
        family=model.entry.family,
        version=spec.version if spec is not None else "",
        weight_digest=model.adapters.digest(target.adapter),
        license=spec.license if spec is not None else "",
        max_model_len=model.capabilities.max_model_len,
        state=pb.Model.State.Value(f"STATE_{target.state.value}"),
        state_reason=target.state_reason,
    )
