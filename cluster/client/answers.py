"""Results of calls: whole answers, and the state of a stream while the stream is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.client.tools import ToolCall, ToolCallDeltas, tool_calls_of
from cluster.v1 import inference_pb2 as pb

Raw = TypeVar("Raw", pb.ChatResponse, pb.CompleteResponse)
Chunk = TypeVar("Chunk", pb.ChatChunk, pb.CompleteChunk)


@dataclass(frozen=True, slots=True)
class Answer(Generic[Raw]):
    """A whole answer.

    `text`, `finish_reason`, `reasoning` and `tool_calls` are the values of the first choice. `raw` is the response
    message with all choices.
    """

    text: str
    finish_reason: str
    usage: pb.Usage
    id: str
    model: str
    request_id: str
    raw: Raw
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message in OpenAI's format, for the history of the chat."""
        return as_message(self.text, self.reasoning, self.tool_calls)

    def __str__(self) -> str:
        return self.text


ChatAnswer = Answer[pb.ChatResponse]
CompleteAnswer = Answer[pb.CompleteResponse]


def as_message(text: str, reasoning: str, tool_calls: Sequence[ToolCall]) -> dict[str, Any]:
    """Return an answer as a message in OpenAI's format."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    if tool_calls:
        message["tool_calls"] = [call.as_dict() for call in tool_calls]
    return message


def chat_answer(raw: pb.ChatResponse, request_id: str) -> ChatAnswer:
    """Convert the response message of a chat to a ChatAnswer."""
    first = raw.choices[0] if raw.choices else pb.Choice()
    message = first.message
    return Answer(
        message.content,
        first.finish_reason,
        raw.usage,
        raw.id,
        raw.model,
        request_id,
        raw,
        message.reasoning_content,
        tool_calls_of(message),
    )


def complete_answer(raw: pb.CompleteResponse, request_id: str) -> CompleteAnswer:
    """Convert the response message of a completion to a CompleteAnswer."""
    first = raw.choices[0] if raw.choices else pb.CompleteChoice()
    return Answer(first.text, first.finish_reason, raw.usage, raw.id, raw.model, request_id, raw)


def text_chunk(request: pb.ChatRequest | pb.CompleteRequest, text: str) -> pb.ChatChunk | pb.CompleteChunk:
    """Return a chunk that adds `text` to the first choice of the answer to `request`."""
    if isinstance(request, pb.ChatRequest):
        return pb.ChatChunk(choices=[pb.ChoiceDelta(delta=pb.Message(content=text))])
    return pb.CompleteChunk(choices=[pb.CompleteChoice(text=text)])


class StreamState:
    """The parts of a streamed answer that were received so far.

    `finish_reason` and `usage` are set at the end of the stream. `progress` is set only while the newest chunk reports
    that the call is still queued. `request_id` identifies the call in the operator's logs.
    """

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.id = ""
        self.model = ""
        self._parts: list[str] = []
        self._reasoning: list[str] = []
        self._tool_calls = ToolCallDeltas()
        self.finish_reason = ""
        self.usage: pb.Usage | None = None
        self.progress: pb.Progress | None = None

    @property
    def text(self) -> str:
        """The part of the first choice's text that was received so far."""
        return "".join(self._parts)

    @property
    def reasoning(self) -> str:
        """The part of the first choice's reasoning that was received so far."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The first choice's tool calls. The last one is incomplete until the stream has ended."""
        return self._tool_calls.calls

    @property
    def message(self) -> dict[str, Any]:
        """The answer so far as a message in OpenAI's format, for the history of the chat."""
        return as_message(self.text, self.reasoning, self.tool_calls)

    def _record(self, chunk: pb.ChatChunk | pb.CompleteChunk | str) -> str:
        """Record a chunk or a piece of text. Returns the first choice's new text, or "" if there is no new text."""
        if isinstance(chunk, str):
            self.progress = None
            self._parts.append(chunk)
            return chunk
        self.id = chunk.id or self.id
        self.model = chunk.model or self.model
        if chunk.HasField("usage"):
            self.usage = chunk.usage
        self.progress = chunk.progress if chunk.HasField("progress") else None
        text = ""
        for choice in chunk.choices:
            if choice.index == 0:
                text += self._delta(choice.delta) if isinstance(choice, pb.ChoiceDelta) else choice.text
                self.finish_reason = choice.finish_reason or self.finish_reason
        self._parts.append(text)
        return text

    def _delta(self, delta: pb.Message) -> str:
        """Record the reasoning and the tool calls of a delta. Returns the delta's text."""
        if delta.reasoning_content:
            self._reasoning.append(delta.reasoning_content)
        if delta.tool_calls:
            self._tool_calls.add(delta.tool_calls)
        return delta.content
