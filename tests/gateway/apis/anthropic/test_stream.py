"""Tests that Anthropic's API sends the same message in a streamed answer as in a whole answer, from the same parts of
an output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.output_parts import OutputPart, PartKind
from cluster.gateway.apis.anthropic.answers import page_of, stop_of, whole_message
from cluster.gateway.apis.anthropic.stream import PING, MessageEvents, ping
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.keepalive import CallProgress
from cluster.gateway.calls.sequences.pieces import Piece

HEAD = {"id": "msg_1", "type": "message", "role": "assistant", "model": "sim"}
USAGE = CallUsage(prompt_tokens=10, completion_tokens=7, cached_tokens=4, reasoning_tokens=2)
CONTENT, REASONING = PartKind.CONTENT, PartKind.REASONING
TOOL_NAME, TOOL_ARGUMENTS = PartKind.TOOL_NAME, PartKind.TOOL_ARGUMENTS
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


def tool_id(part: OutputPart) -> str:
    """Return the id of a tool call."""
    return f"toolu_{part.call}"


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Return the data of each event of a stream. Asserts that each event is ASCII and that its name equals the type in
    its data."""
    events = []
    for block in stream.decode("ascii").removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the message of a stream, as a client builds it. Asserts the order that Anthropic documents: the start of
    the message; the start, deltas and stop of each content block; then the message's delta and stop."""
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message: dict[str, Any] = events[0]["message"]
    arguments: dict[int, str] = {}
    opened = False
    assert events[0]["type"] == "message_start"
    blocks = message["content"]
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert (opened, event["index"]) == (False, len(blocks))
                opened = True
                blocks.append(event["content_block"])
            case "content_block_delta":
                assert (opened, event["index"]) == (True, len(blocks) - 1)
                _add(blocks[-1], event["delta"], arguments, event["index"])
            case "content_block_stop":
                assert (opened, event["index"]) == (True, len(blocks) - 1)
                opened = False
            case other:
                raise AssertionError(other)
    assert not opened
    for index, text in arguments.items():
        blocks[index]["input"] = json.loads(text)
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message


def _add(block: dict[str, Any], delta: dict[str, Any], arguments: dict[int, str], index: int) -> None:
    match delta["type"]:
        case "text_delta":
            block["text"] += delta["text"]
        case "thinking_delta":
            block["thinking"] += delta["thinking"]
        case "signature_delta":
            block["signature"] = delta["signature"]
        case "input_json_delta":
            assert block["type"] == "tool_use"
            arguments[index] = arguments.get(index, "") + delta["partial_json"]
        case other:
            raise AssertionError(other)


@st.composite
def outputs(draw: st.DrawFn) -> list[OutputPart]:
    """Draw the parts of an output: texts, reasoning and tool calls in any order."""
    parts, calls = [], 0
    for kind in draw(st.lists(st.sampled_from([CONTENT, REASONING, TOOL_NAME]), max_size=6)):
        if kind is not TOOL_NAME:
            parts.append(OutputPart(kind, draw(TEXTS)))
            continue
        arguments = draw(st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=2))
        parts.append(OutputPart(TOOL_NAME, draw(TEXTS), calls))
        parts.append(OutputPart(TOOL_ARGUMENTS, draw(st.sampled_from(["", json.dumps(arguments)])), calls))
        calls += 1
    return parts


@st.composite
def splits(draw: st.DrawFn, parts: list[OutputPart]) -> list[Piece]:
    """Draw pieces that hold these parts in order. Texts are cut at any place, and a piece holds any number of parts."""
    cut: list[OutputPart] = []
    for part in parts:
        if part.kind is TOOL_NAME:
            cut.append(part)
            continue
        ends = sorted(draw(st.lists(st.integers(0, len(part.text)), max_size=3)))
        for start, end in zip([0, *ends], [*ends, len(part.text)], strict=True):
            cut.append(OutputPart(part.kind, part.text[start:end], part.call))
    pieces, left = [], list(cut)
    while left:
        size = draw(st.integers(1, len(left)))
        taken, left = left[:size], left[size:]
        text = "".join(part.text for part in taken if part.kind is CONTENT)
        plain = draw(st.booleans()) and all(part.kind is CONTENT for part in taken)
        pieces.append(Piece(0, text, parts=() if plain else taken))
    return [*pieces, Piece(0, "", draw(st.sampled_from(["stop", "length", "tool_calls"])))]


def streamed(pieces: Sequence[Piece]) -> bytes:
    """Return the event stream of an answer that consists of these pieces. A piece of only text within a text block is
    encoded by `MessageEvents.text`, the fast path, as in production."""
    events, out = MessageEvents(HEAD, lambda: USAGE, tool_id), b""
    for piece in pieces:
        if events.in_text and piece.text and not (piece.parts or piece.finish_reason):
            out += events.text(piece.text)
        else:
            out += events.pieces([piece])
    return out + events.end()


@given(st.data())
def test_any_split_gives_the_same_message(data: st.DataObject) -> None:
    """However an output's parts are split into pieces, the stream has the order of events that Anthropic's API
    prescribes. The events add up to the message of the whole answer."""
    parts = data.draw(outputs())
    pieces = data.draw(splits(parts))
    text = "".join(part.text for part in parts if part.kind is CONTENT)
    whole = whole_message(HEAD, USAGE, tool_id, Piece(0, text, pieces[-1].finish_reason, parts=parts))
    assert joined(events_of(streamed(pieces))) == whole


def test_the_events_of_an_answer() -> None:
    """The events of a stream have the fields that Anthropic documents."""
    parts = [OutputPart(REASONING, "hm"), OutputPart(CONTENT, "é"), OutputPart(TOOL_NAME, "f")]
    parts.append(OutputPart(TOOL_ARGUMENTS, '{"x": 1}'))
    start, *blocks, delta, stop = events_of(streamed([Piece(0, "é", "tool_calls", parts=parts)]))
    counts = {"input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 7}
    empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    assert start == {"type": "message_start", "message": {**HEAD, **empty, "usage": counts}}
    signed = {"type": "signature_delta", "signature": ""}
    use = {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {}}

    def block(name: str, index: int, **fields: Any) -> dict[str, Any]:
        return {"type": f"content_block_{name}", "index": index, **fields}

    assert blocks == [
        block("start", 0, content_block={"type": "thinking", "thinking": "", "signature": ""}),
        block("delta", 0, delta={"type": "thinking_delta", "thinking": "hm"}),
        block("delta", 0, delta=signed),
        block("stop", 0),
        block("start", 1, content_block={"type": "text", "text": ""}),
        block("delta", 1, delta={"type": "text_delta", "text": "é"}),
        block("stop", 1),
        block("start", 2, content_block=use),
        block("delta", 2, delta={"type": "input_json_delta", "partial_json": '{"x": 1}'}),
        block("stop", 2),
    ]
    usage = {**counts, "output_tokens_details": {"thinking_tokens": 2}}
    ended = {"stop_reason": "tool_use", "stop_sequence": None}
    assert delta == {"type": "message_delta", "delta": ended, "usage": usage}
    assert stop == {"type": "message_stop"}


def test_late_arguments_reach_their_call() -> None:
    """Arguments that a parser adds to an earlier tool call go to the block of that tool call, in whole and streamed
    answers."""
    parts = [OutputPart(TOOL_NAME, "f", 0), OutputPart(TOOL_ARGUMENTS, '{"x": ', 0), OutputPart(TOOL_NAME, "g", 1)]
    parts += [OutputPart(TOOL_ARGUMENTS, "{}", 1), OutputPart(TOOL_ARGUMENTS, "1}", 0)]
    whole = whole_message(HEAD, USAGE, tool_id, Piece(0, "", "tool_calls", parts=parts))
    assert [block["input"] for block in whole["content"]] == [{"x": 1}, {}]
    deltas = [event for event in events_of(streamed([Piece(0, "", "tool_calls", parts=parts)])) if "delta" in event]
    shown = [(event["index"], event["delta"]["partial_json"]) for event in deltas[:-1]]
    assert shown == [(0, '{"x": '), (1, "{}"), (0, "1}")]


@pytest.mark.parametrize("text", ['{"x": ', "[1]", "{}", "nothing", '{"x": NaN}', '{"x": 1e999}', "[" * 100_000])
def test_arguments_that_are_no_object(text: str) -> None:
    """Arguments that are not a JSON object are shown as an empty object in a whole answer."""
    parts = [OutputPart(TOOL_NAME, "f"), OutputPart(TOOL_ARGUMENTS, text)]
    assert whole_message(HEAD, USAGE, tool_id, Piece(0, "", "length", parts=parts))["content"][0]["input"] == {}


@pytest.mark.parametrize(
    ("finish", "stop_string", "expected"),
    [
        ("stop", "", ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", "", ("max_tokens", None)),
        ("tool_calls", "", ("tool_use", None)),
        ("content_filter", "", ("refusal", None)),
    ],
)
def test_stop_reasons(finish: str, stop_string: str, expected: tuple[str, str | None]) -> None:
    """A finish reason gets Anthropic's name, and a stop string is reported as the stop sequence."""
    assert stop_of(Piece(0, "", finish, stop_string=stop_string)) == expected


@pytest.mark.parametrize(("cut", "reason"), [(True, "stop_sequence"), (False, "tool_use")])
def test_a_call_that_a_stop_sequence_cuts_is_not_run(cut: bool, reason: str) -> None:
    """If a stop sequence cuts off the last tool call, the stop reason is `stop_sequence`. If the tool call is complete,
    the stop reason is `tool_use`, whatever text follows. Whole and streamed answers agree."""
    parts = [OutputPart(TOOL_NAME, "f", 0), OutputPart(TOOL_ARGUMENTS, "{}", 0), OutputPart(TOOL_NAME, "g", 1)]
    parts.append(OutputPart(TOOL_ARGUMENTS, '{"x": ' if cut else '{"x": 1}', 1))
    piece = Piece(0, "", "tool_calls", parts=[*parts, OutputPart(CONTENT, "and")], stop_string="END")
    whole = whole_message(HEAD, USAGE, tool_id, piece)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, "END" if cut else None)
    delta = events_of(streamed([piece]))[-2]["delta"]
    assert delta == {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}


def test_pings() -> None:
    """A ping is an event. While the model is starting, a comment with the progress precedes the event."""
    assert ping(CallProgress("queued", 1)) == PING
    comment, _, rest = ping(CallProgress("loading", 0, 0.5, 30.0)).partition(b"\n")
    assert (comment, rest) == (b": loading 50%, about 30 s to go", PING)


@given(st.integers(0, 12), st.integers(1, 5), st.booleans())
def test_pages_show_every_model_once(count: int, limit: int, backwards: bool) -> None:
    """A client that reads page after page, in either direction, sees every model once, in order."""
    infos = [{"id": f"m{i}"} for i in range(count)]
    seen: list[dict[str, Any]] = []
    page = page_of(infos, limit, "", f"m{count - 1}" if backwards and count else "")
    if backwards and count:
        seen = infos[-1:]
    for _ in range(count + 1):
        data = page["data"]
        assert len(data) <= limit
        assert (page["first_id"], page["last_id"]) == ((data[0]["id"], data[-1]["id"]) if data else (None, None))
        seen = [*data, *seen] if backwards else [*seen, *data]
        if not page["has_more"]:
            break
        page = page_of(infos, limit, "" if backwards else page["last_id"], page["first_id"] if backwards else "")
    assert seen == infos
