"""Encoding of whole answers, usage and models as the JSON of Anthropic's API."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.apis.anthropic.content import TOOL_ID_PREFIX
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.tool_call_ids import id_in_answer
from cluster.gateway.models.target import Target

ToolId = Callable[[OutputPart], str]
"""Function that returns the id that a client sees for a tool call. The argument is the output part that names the
called function."""

LIFECYCLE: Final = "active"
"""The lifecycle stage of every model in a model list."""
_STOP_REASONS: Final[Mapping[str, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}


def message_id(call: Call) -> str:
    """Return the id of the answer to a call."""
    return f"msg_{call.shown_id.partition('-')[2]}"


def tool_ids(call: Call) -> ToolId:
    """Return a function that maps a part of the output to the id of the tool call that the part belongs to. For a call
    with one choice."""
    return lambda part: TOOL_ID_PREFIX + id_in_answer(call, 0, part.call, part.text)


def parts_of(piece: Piece) -> Sequence[OutputPart]:
    """Return the parts of a piece. A piece without parts is returned as one part that holds its text as content."""
    if piece.parts or not piece.text:
        return piece.parts
    return (OutputPart(PartKind.CONTENT, piece.text),)


def stop_of(piece: Piece, last_arguments: Sequence[str] = ()) -> tuple[str, str | None]:
    """Return two values: the stop reason of an answer, and the stop sequence that ended the answer. The second value is
    None if no stop sequence ended the answer.

    `piece`: the last piece of the answer. `last_arguments`: the fragments of the last tool call's arguments. If a stop
    sequence has cut the last tool call, the stop reason is `stop_sequence`. It must not be `tool_use`, because a client
    would then run the tool call.
    """
    if piece.stop_string and piece.finish_reason == "stop":
        return "stop_sequence", piece.stop_string
    if piece.stop_string and piece.finish_reason == "tool_calls" and _parsed_arguments(last_arguments) is None:
        return "stop_sequence", piece.stop_string
    return _STOP_REASONS.get(piece.finish_reason, "end_turn"), None


def usage_of(usage: CallUsage) -> dict[str, Any]:
    """Return Anthropic's usage object. The object's input tokens do not include the prompt tokens that were in the
    cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def final_usage(usage: CallUsage) -> dict[str, Any]:
    """Return the usage object of an answer that has ended."""
    return {**usage_of(usage), "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}}


# ---- whole answers


class ContentBlocks:
    """The content blocks of a whole answer, built from the answer's parts in order."""

    def __init__(self, tool_id: ToolId) -> None:
        self._tool_id = tool_id
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[list[str]] = []
        """The texts of each block, not joined yet."""
        self._of_call: dict[int, int] = {}
        """Position of each tool call's block, keyed by the number of the tool call."""

    def add(self, part: OutputPart) -> None:
        """Add the next part of the answer."""
        match part.kind:
            case PartKind.CONTENT:
                self._add_text("text", part.text)
            case PartKind.REASONING:
                self._add_text("thinking", part.text)
            case PartKind.TOOL_NAME:
                self._of_call[part.call] = len(self._blocks)
                self._blocks.append({"type": "tool_use", "id": self._tool_id(part), "name": part.text})
                self._texts.append([])
            case PartKind.TOOL_ARGUMENTS:
                self._texts[self._of_call[part.call]].append(part.text)

    def _add_text(self, kind: str, text: str) -> None:
        if not text:
            return
        if not self._blocks or self._blocks[-1]["type"] != kind:
            self._blocks.append({"type": kind})
            self._texts.append([])
        self._texts[-1].append(text)

    def blocks(self) -> list[dict[str, Any]]:
        """Return the blocks."""
        return [_finished(block, texts) for block, texts in zip(self._blocks, self._texts, strict=True)]

    @property
    def last_arguments(self) -> Sequence[str]:
        """Fragments of the arguments of the last tool call."""
        return self._texts[self._of_call[max(self._of_call)]] if self._of_call else ()


def _finished(block: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    match block["type"]:
        case "text":
            return {**block, "text": "".join(texts)}
        case "thinking":
            return {**block, "thinking": "".join(texts), "signature": ""}
        case _:  # arguments that were cut are shown as an empty object: the API has no other form for them
            return {**block, "input": _parsed_arguments(texts) or {}}


def _parsed_arguments(fragments: Sequence[str]) -> dict[str, Any] | None:
    """Return the arguments of a tool call; None if they are not a JSON object, because the answer was cut or the model
    erred."""
    try:
        value = json.loads("".join(fragments) or "{}", parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refused(digits)


def message_head(call: Call) -> dict[str, Any]:
    """Return those fields of an answer that are known before the answer ends."""
    return {"id": message_id(call), "type": "message", "role": "assistant", "model": call.shown_model}


def whole_message(head: Mapping[str, Any], usage: CallUsage, tool_id: ToolId, piece: Piece) -> dict[str, Any]:
    """Return a whole answer. `head`: the fields that `message_head` returns. `piece`: the only piece of the call's only
    sequence."""
    blocks = ContentBlocks(tool_id)
    for part in parts_of(piece):
        blocks.add(part)
    reason, sequence = stop_of(piece, blocks.last_arguments)
    stop = {"stop_reason": reason, "stop_sequence": sequence}
    return {**head, "content": blocks.blocks(), **stop, "usage": final_usage(usage)}


# ---- models


def model_info(target: Target, created: float) -> dict[str, Any]:
    """Return a model or adapter in the shape of Anthropic's model list. `created`: Unix time in seconds."""
    model = target.model
    return {
        "type": "model",
        "id": target.name,
        "display_name": target.name,
        "created_at": datetime.fromtimestamp(int(created), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": LIFECYCLE,
        "max_input_tokens": model.capabilities.max_model_len or None,
        "max_tokens": model.capabilities.max_model_len or None,
    }


def page_of(infos: Sequence[dict[str, Any]], limit: int, after: str, before: str) -> dict[str, Any]:
    """Return one page of a list. `after`: the id after which the page begins, or "". `before`: the id before which the
    page ends, or "". An unknown id gives an empty page."""
    ids = [info["id"] for info in infos]
    first, last = 0, len(infos)
    if after:
        first = ids.index(after) + 1 if after in ids else last
    if before:
        last = ids.index(before) if before in ids else first
    if before and not after:
        page, has_more = infos[max(first, last - limit) : last], last - first > limit
    else:
        page, has_more = infos[first : min(last, first + limit)], last - first > limit
    return {
        "data": list(page),
        "has_more": has_more,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }
