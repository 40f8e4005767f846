"""OpenAI's JSON for output pieces, usage, models and errors. An answer is one JSON document or a stream of server-sent
events.

In a stream, each token is an event. The JSON around the text of a token is rendered once per call, since encoding a
dictionary for each token would cost more than sending the token. All output is ASCII: some clients split lines at
U+2028 and U+0085, and JSON encoders escape these characters only in ASCII output.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from cluster.api.outcomes import OUTCOME_STATUS, CallError
from cluster.api.output_parts import PartKind
from cluster.gateway.apis.openai.logprobs import TextOffsets, chat_logprobs
from cluster.gateway.apis.slices import in_slices
from cluster.gateway.apis.whole_logprobs import ChoiceLogprobs, WholeAnswer
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.keepalive import CallProgress, ProgressOf
from cluster.gateway.calls.logprob_cuts import LogprobCuts
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.tool_call_ids import id_in_answer
from cluster.gateway.models.target import Target
from cluster.gateway.text.logprobs import TokenLogprob

DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"

_encode = json.JSONEncoder(separators=(",", ":")).encode
_escape = json.encoder.encode_basestring_ascii  # the C function that the encoder uses for strings

_ERROR_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}


def body(value: object) -> bytes:
    """Return a value as compact JSON."""
    return _encode(value).encode("ascii")


# ---- errors


def error_body(message: str, status: int, code: str, param: str | None = None) -> bytes:
    """Return an error as the JSON of OpenAI's error object."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return body({"error": {"message": message, "type": kind, "param": param, "code": code}})


def call_error_body(error: CallError) -> bytes:
    """Return the error of a call as the JSON of OpenAI's error object. The object's `code` is the outcome in lower
    case, and its `param` is the first wrong field."""
    param = error.violations[0].field if error.violations else None
    return error_body(error.message, OUTCOME_STATUS[error.outcome].http, error.outcome.name.lower(), param)


# ---- parts


def usage_of(usages: Sequence[CallUsage]) -> dict[str, Any]:
    """Return OpenAI's usage object, with the token counts summed over all calls of a request."""
    prompt = sum(u.prompt_tokens for u in usages)
    completion = sum(u.completion_tokens for u in usages)
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }
    if reasoning := sum(u.reasoning_tokens for u in usages):
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return usage


def message_parts(call: Call, piece: Piece, *, stream: bool) -> dict[str, Any]:
    """Return the fields of a message, or of a delta, that hold the parts of a piece. In a stream each tool call also
    has the field `index`."""
    fields: dict[str, Any] = {}
    reasoning = "".join(part.text for part in piece.parts if part.kind is PartKind.REASONING)
    if reasoning:
        fields["reasoning_content"] = reasoning
    if calls := _tool_calls(call, piece, stream=stream):
        fields["tool_calls"] = calls
    if piece.text or not (fields or piece.finish_reason):
        fields["content"] = piece.text
    return fields


def _tool_calls(call: Call, piece: Piece, *, stream: bool) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for part in piece.parts:
        if part.kind not in (PartKind.TOOL_NAME, PartKind.TOOL_ARGUMENTS):
            continue
        shown = calls.setdefault(part.call, {"index": part.call} if stream else {})
        if part.kind is PartKind.TOOL_NAME:
            shown |= {"id": id_in_answer(call, piece.index, part.call, part.text), "type": "function"}
            shown["function"] = {"name": part.text, "arguments": ""}
        else:
            function = shown.setdefault("function", {"arguments": ""})
            function["arguments"] += part.text
    return list(calls.values())


# ---- streams


class SseStream(ABC):
    """Renders the events of one streamed answer. Subclasses define the JSON of an element of the event's `choices`."""

    kind = ""
    before_text = ""
    after_text = ""

    def __init__(
        self, answer_id: str, model: str, created: int, *, include_usage: bool = False, continuous_usage: bool = False
    ) -> None:
        shown = {"id": answer_id, "object": self.kind, "created": created, "model": model}
        self._head = f"data: {_encode(shown)[:-1]}," + '"choices":['
        self._end = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._include_usage = include_usage
        self.continuous_usage = continuous_usage
        self._fields_after_delta = ',"logprobs":null,"finish_reason":null}' + self._end
        self.text_end = self.after_text + self._fields_after_delta
        """The end of the event of a piece that holds only a text."""
        self._starts: dict[int, str] = {}

    def events(self, call: Call, pieces: Sequence[Piece], shift: int = 0) -> bytes:
        """Return one event for each piece. `shift`: index of the first choice of `call` in the answer. It is above 0 if
        the answer begins with the choices of other calls."""
        parts = []
        for piece in pieces:
            if piece.finish_reason or piece.first or piece.logprobs or self.continuous_usage:
                parts.append(self._full(call, piece, shift).encode("ascii"))
            elif piece.parts:
                parts.append((self._one_part(piece, shift) or self._full(call, piece, shift)).encode("ascii"))
            else:
                parts.append(self.text(piece.index + shift, piece.text))
        return b"".join(parts)

    def text(self, index: int, text: str) -> bytes:
        """Return the event for a piece of the answer that consists of text only. Must not be called for the first piece
        of a choice, or if the caller has requested the usage in every event."""
        return (self.text_start(index) + _escape(text) + self.text_end).encode("ascii")

    def text_start(self, index: int) -> str:
        """Return the beginning of the event for a piece of output that is only text. The text itself follows."""
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = f'{self._head}{{"index":{index},{self.before_text}'
        return start

    def _one_part(self, piece: Piece, shift: int) -> str:
        """Return the event of a piece that consists of one part; "" for any other piece, which `_full` must render.
        This method is cheaper than `_full`. `shift`: number that is added to the piece's index."""
        return ""

    def _full(self, call: Call, piece: Piece, shift: int) -> str:
        choice = {
            "index": piece.index + shift,
            **self._content(call, piece),
            "logprobs": None,
            "finish_reason": piece.finish_reason or None,
        }
        end = self._end
        if self.continuous_usage:
            so_far = CallUsage(call.usage.prompt_tokens, len(call.sequences[piece.index].emitted))
            end = f'],"usage":{_encode(usage_of([so_far]))}}}\n\n'
        if piece.logprobs:
            logprobs = self._logprobs(piece.index + shift, piece.logprobs)
            return self._head + _with_logprobs(_encode(choice), logprobs) + end
        return self._head + _encode(choice) + end

    def end(self, usages: Sequence[CallUsage]) -> bytes:
        """Return the events after the last piece: the usage if it was requested, then [DONE]."""
        if not self._include_usage:
            return DONE
        return f'{self._head}],"usage":{_encode(usage_of(usages))}}}\n\n'.encode("ascii") + DONE

    @abstractmethod
    def _content(self, call: Call, piece: Piece) -> dict[str, Any]:
        """Return the fields of a choice that hold the text and the parts of the piece."""

    @abstractmethod
    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> str:
        """Return the log probabilities of a piece as the JSON that this API uses."""


class ChatStream(SseStream):
    """The server-sent events of a streamed answer of /v1/chat/completions."""

    kind = "chat.completion.chunk"
    before_text = '"delta":{"content":'
    after_text = "}"

    def _one_part(self, piece: Piece, shift: int) -> str:
        if len(piece.parts) != 1:
            return ""
        ((kind, text, number),) = piece.parts
        if kind is not PartKind.TOOL_ARGUMENTS:
            return ""
        start = f'{self._head}{{"index":{piece.index + shift},"delta":{{"tool_calls":[{{"index":{number},'
        return start + f'"function":{{"arguments":{_escape(text)}}}}}]}}' + self._fields_after_delta

    def _content(self, call: Call, piece: Piece) -> dict[str, Any]:
        role = {"role": "assistant"} if piece.first else {}
        if piece.parts:
            return {"delta": {**role, **message_parts(call, piece, stream=True)}}
        return {"delta": {**role, "content": piece.text}}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> str:
        return chat_logprobs(logprobs)


class CompletionStream(SseStream):
    """The server-sent events of a streamed answer of /v1/completions."""

    kind = "text_completion"
    before_text = '"text":'

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offsets = TextOffsets()

    def _content(self, call: Call, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> str:
        return _encode(self._offsets.logprobs(index, logprobs))


def keep_alive(progress: CallProgress) -> bytes:
    """Return a line that shows a streaming client that its call is alive. The line is a comment of the event stream,
    which clients ignore. If the model is starting, the comment also reports the progress of the start."""
    if not progress.eta_s:
        return KEEP_ALIVE
    text = f"{progress.state} {progress.fraction:.0%}, about {progress.eta_s:.0f} s to go"
    return f": {text}\n\n".encode()


class SseEncoder:
    """Encodes the pieces of a call as server-sent events. Implements calls.stream_writer.ChunkEncoder."""

    __slots__ = (
        "_call",
        "_output",
        "_pop_pieces",
        "_progress",
        "_shift",
        "_stream",
        "_text_end",
        "_text_start",
        "ended",
        "plain",
    )

    def __init__(self, call: Call, stream: SseStream, shift: int, progress: ProgressOf) -> None:
        self._progress = progress
        self.ended = False
        self._call = call
        self._output = call.output
        has_logprobs = call.sequences[0].logprob_texts is not None
        self._pop_pieces = LogprobCuts(call).pop_pieces if has_logprobs else call.output.pop_pieces
        self._stream = stream
        self._shift = shift
        self._text_start, self._text_end = stream.text_start(shift), stream.text_end
        self.plain = len(call.sequences) == 1 and not stream.continuous_usage

    def encode_text(self, text: str) -> bytes:
        """Return the event for a next token that adds `text` and changes nothing else. Implements ChunkEncoder."""
        return (self._text_start + _escape(text) + self._text_end).encode("ascii")

    def encode_new(self) -> bytes:
        """Return the events of everything that is new in the call, or a keep-alive if one is due; b"" if nothing is to
        be sent. Implements ChunkEncoder."""
        output = self._output
        if self.plain and (text := output.pop_text()) is not None:
            return self.encode_text(text) if text else b""
        pieces = self._pop_pieces()
        if pieces:
            self.ended = output.end_delivered
            return self._stream.events(self._call, pieces, self._shift)
        if output.pop_keepalive():
            return keep_alive(self._progress(self._call))
        return b""


def error_event(error: CallError) -> bytes:
    """Return an error as an event of a stream. No [DONE] follows the event, as the answer is incomplete."""
    return b"data: " + call_error_body(error) + b"\n\n"


# ---- whole answers


def chat_choices(calls: Sequence[Call], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return the choices of a complete chat answer, without log probabilities. `pieces`: one piece for each choice. A
    chat has one call."""
    return [
        {
            "index": p.index,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                **(message_parts(calls[0], p, stream=False) if p.parts else {"content": p.text}),
            },
            "logprobs": None,
            "finish_reason": p.finish_reason,
        }
        for p in pieces
    ]


def completion_choices(calls: Sequence[Call], pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Return the choices of a complete completion answer, without log probabilities. `pieces`: one piece for each
    choice of each prompt."""
    return [{"index": p.index, "text": p.text, "logprobs": None, "finish_reason": p.finish_reason} for p in pieces]


def whole_answer(
    kind: str, answer_id: str, model: str, created: int, choices: Sequence[Mapping[str, Any]], calls: Sequence[Call]
) -> bytes:
    """Return a complete answer as JSON. `kind`: the value of the answer's field `object`."""
    usage = usage_of([call.usage for call in calls])
    return body(
        {"id": answer_id, "object": kind, "created": created, "model": model, "choices": choices, "usage": usage}
    )


async def answer_with_logprobs(
    head: Mapping[str, Any],
    choices: Sequence[Mapping[str, Any]],
    wholes: Sequence[WholeAnswer],
    calls: Sequence[Call],
) -> list[bytes | bytearray]:
    """Return a complete answer with log probabilities as JSON in parts, which are made in slices of time. `head`: the
    answer's fields before `choices`. `choices`: the choices without log probabilities."""
    logprobs = [choice for whole in wholes for choice in whole.logprobs]
    parts = await in_slices(_choice_parts(choices, logprobs))
    end = b'],"usage":' + body(usage_of([call.usage for call in calls])) + b"}"
    return [body(head)[:-1] + b',"choices":[', *parts, end]


def _choice_parts(
    choices: Sequence[Mapping[str, Any]], logprobs: Sequence[ChoiceLogprobs]
) -> Iterator[bytes | bytearray]:
    for at, (choice, encoded) in enumerate(zip(choices, logprobs, strict=True)):
        start, end = _around_logprobs(_encode(choice))
        yield ("," + start if at else start).encode("ascii")
        yield from encoded.parts()
        yield end.encode("ascii")


def _with_logprobs(choice: str, logprobs: str) -> str:
    start, end = _around_logprobs(choice)
    return start + logprobs + end


def _around_logprobs(choice: str) -> tuple[str, str]:
    """Return the JSON of a choice before and after the value of its field `logprobs`, which must be null. Only
    `finish_reason` follows this field."""
    start, name, end = choice.rpartition('"logprobs":null')
    return start + name[:-4], end


def model_card(target: Target, aliases: Sequence[str], created: int) -> dict[str, Any]:
    """Return a model or adapter in the shape of /v1/models. The fields that OpenAI's API does not have come last.
    `aliases`: the aliases of the model that the caller may use."""
    tasks = target.model.capabilities.tasks
    adapter = {"parent": target.model.name, "root": target.adapter} if target.adapter else {}
    return {
        "id": target.name,
        "object": "model",
        "created": created,
        "owned_by": "headrace",
        **adapter,
        "max_model_len": target.model.capabilities.max_model_len or None,
        "aliases": [] if target.adapter else list(aliases),
        "state": target.state.value,
        **({"state_reason": target.state_reason} if target.adapter and target.state_reason else {}),
        "tasks": sorted(tasks) if tasks else [] if tasks is None else ["generate"],
    }
