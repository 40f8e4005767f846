"""The parsing of one output with vLLM's real parsers: neither the split into steps nor a resume changes the parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.output_parts import PartKind, merge_parts
from cluster.worker.parsing import session as session_module
from cluster.worker.parsing import wire
from cluster.worker.parsing.coalescing import COALESCED, REPLAYED_TOGETHER, Coalescing
from cluster.worker.parsing.kit import ParserKit
from cluster.worker.parsing.port import LEAVE_TEXT_UNCHANGED
from tests.worker.parsing.formats import (
    CALLS,
    FORMATS,
    LONG,
    THOUGHT,
    TOOLS,
    Format,
    called,
    encode,
    joined,
    kit_for,
    opening,
    opening_for,
)

pytestmark = pytest.mark.engine

QUICK = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
all_formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def prompt_ids(folder: Path, form: Format) -> list[int]:
    """Return the token ids of a prompt. If the format has reasoning, the prompt ends within the reasoning."""
    return encode(folder, PROMPT + ("<think>\n" if form.reasoning else ""))


def run(
    kit: ParserKit, message: wire.Open, steps: Sequence[Sequence[int]], state: int = wire.ENDED
) -> list[wire.Parsed]:
    """Parse the steps in a new session and return the result of each. `state`: how the last step ends the output."""
    session, opened = kit.open(message)
    assert session is not None, opened
    states = [wire.RUNS] * (len(steps) - 1) + [state]
    return [session.feed(1, step, how) for step, how in zip(steps, states, strict=True)]


def vllm_parser(kit: ParserKit, form: Format, request: Any) -> Any:
    """Return vLLM's parser for a request."""
    return kit.parser_class(kit.tokenizer, request.tools, chat_template_kwargs=dict(form.template_kwargs))


def vllm_stream(kit: ParserKit, form: Format, prompt: list[int], ids: list[int], stop: Sequence[str] = ()) -> Any:
    """Return the parts that vLLM's own server streams with one token per step, and the stop string that ended the
    output.

    vLLM's parser and detokenizer are called here as OpenAIServingChat.chat_completion_stream_generator and
    OutputProcessor call them.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    request = ChatCompletionRequest(messages=[], stream=True, tools=TOOLS, tool_choice="auto")
    kit.parser_class(kit.tokenizer, request.tools, chat_template_kwargs=dict(form.template_kwargs)).adjust_request(
        request
    )
    parser = kit.parser_class(kit.tokenizer, request.tools, chat_template_kwargs=dict(form.template_kwargs))
    params = request.to_sampling_params(1000, {})
    params.stop = list(stop)
    engine_request = SimpleNamespace(
        request_id="r", prompt_token_ids=prompt, prompt_embeds=None, sampling_params=params
    )
    detokenizer = IncrementalDetokenizer.from_new_request(kit.tokenizer, engine_request)
    parts: list[wire.Part] = []
    for at, token_id in enumerate(ids):
        found = detokenizer.update([token_id], False)
        ended = bool(found) or at == len(ids) - 1
        delta = parser.parse_delta(
            detokenizer.get_next_output_text(ended, True), [token_id], request, prompt_token_ids=prompt, finished=ended
        )
        if delta is not None:
            parts += [(PartKind.REASONING, delta.reasoning, 0)] if delta.reasoning else []
            parts += [(PartKind.CONTENT, delta.content, 0)] if delta.content else []
            for call in delta.tool_calls or ():
                parts += [(PartKind.TOOL_NAME, call.function.name, call.index)] if call.function.name else []
                argued = call.function.arguments
                parts += [(PartKind.TOOL_ARGUMENTS, argued, call.index)] if argued else []
        if found:
            return merge_parts(parts), found
    return merge_parts(parts), ""


def steps_of(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Split ids into steps of these sizes; the last step has the rest."""
    steps, rest = [], list(ids)
    for size in sizes:
        steps.append(rest[:size])
        rest = rest[size:]
    return [*steps, rest] if rest or not steps else steps


@pytest.mark.parametrize("form", [form for form in FORMATS if form.streams], ids=lambda form: form.name)
def test_any_split_gives_the_parts_of_vllms_server(folder: Path, form: Format) -> None:
    """For any split of the tokens into steps, the joined parts are those of vLLM's own server with one token per
    step."""
    kit = kit_for(folder, form)
    prompt, ids = prompt_ids(folder, form), encode(folder, form.output)
    expected, _ = vllm_stream(kit, form, prompt, ids)

    @QUICK
    @given(st.lists(st.integers(0, 40), max_size=12))
    def law(sizes: list[int]) -> None:
        assert joined(run(kit, opening_for(form, prompt), steps_of(ids, sizes))) == expected

    law()


@pytest.mark.parametrize("form", [form for form in FORMATS if form.is_right], ids=lambda form: form.name)
def test_the_formats_are_right(folder: Path, form: Format) -> None:
    """Each format's parser finds the tool calls in its example. Otherwise the other tests would prove nothing."""
    kit = kit_for(folder, form)
    for text, calls in ((form.output, CALLS), (form.long, LONG)):
        parts = joined(run(kit, opening_for(form, prompt_ids(folder, form)), [encode(folder, text)]))
        found = called(parts)
        assert [name for name, _ in found] == [name for name, _ in calls][: len(found)]
        assert found, parts
        assert found[0][1]["city"].strip() == calls[0][1]["city"].strip()
        assert any(kind == PartKind.REASONING for kind, _, _ in parts) is bool(form.reasoning)


@all_formats
def test_a_resume_at_any_token_continues_the_parts(folder: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser session may begin with tokens that were already emitted. The parts of these tokens and of the later
    tokens together equal the parts of a session that gets all tokens, wherever the output is divided."""
    kit = kit_for(folder, form)
    prompt = prompt_ids(folder, form)
    ids = encode(folder, form.short)
    expected = joined(run(kit, opening_for(form, prompt), [ids]))
    for cut in range(len(ids)):
        assert joined(run(kit, opening_for(form, prompt, ids[:cut]), [ids[cut:]])) == expected


@all_formats
def test_a_whole_answer_is_vllms_parse(folder: Path, form: Format) -> None:
    """An answer that is not streamed has the reasoning, content and tool calls that vLLM parses from the whole text."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    kit = kit_for(folder, form)
    prompt, ids = prompt_ids(folder, form), encode(folder, form.output)
    request = ChatCompletionRequest(messages=[], tools=TOOLS, tool_choice="auto")
    kit.parser_class(kit.tokenizer, request.tools, chat_template_kwargs=dict(form.template_kwargs)).adjust_request(
        request
    )
    parser = kit.parser_class(kit.tokenizer, request.tools, chat_template_kwargs=dict(form.template_kwargs))
    parser.set_prompt_token_ids(prompt)
    reasoning, content, calls = parser.parse(form.output, request, True, ids)
    parts = joined(run(kit, opening_for(form, prompt, is_whole=True), steps_of(ids, [5, 9, 1])))
    texts = {kind: "".join(text for k, text, _ in parts if k == kind) for kind in PartKind}
    assert texts[PartKind.REASONING] == (reasoning or "")
    assert texts[PartKind.CONTENT] == (content or "")
    assert called(parts) == [(call.name, json.loads(call.arguments)) for call in calls or ()]


def parts_or_error(kit: ParserKit, message: wire.Open, steps: Sequence[Sequence[int]]) -> Any:
    """Return the joined parts of the steps, or the type of the error that the parser raises."""
    try:
        return joined(run(kit, message, steps))
    except Exception as error:  # internlm's parser raises ValueError for a second call
        return type(error)


def texts_of(form: Format) -> list[str]:
    """Return outputs with several tool calls, with text after a tool call, and with a long tool call."""
    return [f"{form.output} And then.\n{form.short.removeprefix(THOUGHT)}", form.long]


@pytest.mark.parametrize(
    "form", {form.tools: form for form in FORMATS if form.tools in COALESCED}.values(), ids=lambda form: form.name
)
def test_coalescing_changes_no_parts(folder: Path, form: Format) -> None:
    """While a long tool call is generated, its output may be parsed less often. This does not change the parsed parts,
    even if the output is cut short."""
    prompt = prompt_ids(folder, form)
    for text in texts_of(form):
        ids = encode(folder, text)
        for end in range(len(ids), 9, -67):
            expected = parts_or_error(kit_for(folder, form, 0), opening_for(form, prompt), [ids[:end]])
            for long_call in (2, 48):
                kit = kit_for(folder, form, long_call)
                parts = parts_or_error(kit, opening_for(form, prompt), [ids[:end]])
                if form.tools == "llama3_json" and end < len(ids):  # its arguments lag behind the tokens
                    assert parts[:-1] == expected[: len(parts) - 1]
                    assert expected[len(parts) - 1][1].startswith(parts[-1][1])
                else:
                    assert parts == expected


@pytest.mark.parametrize(
    "form", [form for form in FORMATS if form.tools in REPLAYED_TOGETHER], ids=lambda form: form.name
)
def test_a_replay_in_few_parses_changes_no_parts(folder: Path, form: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed output has the same parts as an output without interruption, wherever it was interrupted.

    When it is resumed, all tokens before the interruption are parsed together, in few calls of the parser.
    """
    monkeypatch.setattr(session_module, "REPLAYED_TOKENS", 9)
    kit, prompt = kit_for(folder, form), prompt_ids(folder, form)
    assert kit.replays_together
    ids = encode(folder, texts_of(form)[0])
    for end in range(len(ids), 9, -19):
        expected = parts_or_error(kit, opening_for(form, prompt), [ids[:end]])
        for rest in (1, 8):
            emitted = opening_for(form, prompt, ids[: end - rest])
            assert parts_or_error(kit, emitted, [ids[end - rest : end]]) == expected


def test_the_parses_of_a_long_call_grow_with_its_logarithm() -> None:
    """A tool call of 100,000 tokens is parsed fewer than 1,500 times: at first after each token, later less often."""
    coalescing = Coalescing()
    coalescing.record(10, in_call=True)
    due = [position for position in range(11, 100_000) if coalescing.is_due(position)]
    assert due[:200] == list(range(11, 211))
    assert len(due) < 1500
    coalescing.record(100_000, in_call=False)
    assert all(coalescing.is_due(position) for position in range(100_001, 100_100))


@pytest.mark.parametrize("name", ["hermes", "mistral", "llama3_json"])
@pytest.mark.parametrize("stop", [("nd",), ("lo", "look"), ("city", "day"), ("Z", "never seen"), ("</tool",)])
def test_a_stop_string_ends_the_output_as_in_vllm(folder: Path, name: str, stop: tuple[str, ...]) -> None:
    """At any split, a stop string ends the output at the same token and with the same parts as in vLLM."""
    form = next(form for form in FORMATS if form.tools == name)
    kit = kit_for(folder, form)
    prompt, ids = prompt_ids(folder, form), encode(folder, "And ünd: " + form.output + " The end.")
    expected, found = vllm_stream(kit, form, prompt, ids, stop)
    single = run(kit, opening_for(form, prompt, stop=stop), [[token] for token in ids])
    assert joined(single) == expected
    end = next((at + 1 for at, step in enumerate(single) if step.stop), len(ids))
    for size in (2, 7, len(ids)):
        steps = run(kit, opening_for(form, prompt, stop=stop), steps_of(ids, [size] * (len(ids) // size)))
        assert joined(steps) == expected
        assert sum(step.kept for step in steps) == end
        assert {step.stop for step in steps} - {""} == ({found} if found else set())


@pytest.mark.parametrize("name", sorted(LEAVE_TEXT_UNCHANGED - {"xlam"}))
def test_without_tools_the_content_is_the_text(folder: Path, name: str) -> None:
    """Some parsers are not run if a request has no tools. The content is then the unchanged text, as these parsers
    would return it too."""
    form = replace(next((form for form in FORMATS if form.tools == name), FORMATS[0]), tools=name, reasoning="")
    kit = kit_for(folder, form)
    for message in ({"tool_choice": "none"}, {"tool_choice": "none", "tools": []}):
        for text in (form.output, "<tool_call> [f(x=1)] ", '{"name": "x"}'):
            ids = encode(folder, text)
            plain = kit.tokenizer.decode(ids, skip_special_tokens=True)
            for is_whole in (False, True):
                assert joined(run(kit, opening([1], is_whole=is_whole, **message), steps_of(ids, [3]))) == [
                    (PartKind.CONTENT, plain, 0)
                ]


def test_a_stop_string_counts_only_after_min_tokens(folder: Path) -> None:
    """A stop string within the first min_tokens tokens does not end the output, neither in a new nor in a resumed
    request."""
    form = FORMATS[0]
    kit = kit_for(folder, form)
    ids = encode(folder, "one stop two stop three")
    first = next(at + 1 for at, s in enumerate(run(kit, opening([1], stop=("stop",)), [[i] for i in ids])) if s.stop)
    for cut in range(first):
        message = opening([1], ids[:cut], stop=("stop",), min_tokens=first)
        (only,) = run(kit, message, [ids[cut:]])
        assert only.stop == "stop"
        assert cut + only.kept > first


def test_only_the_first_call_counts_without_parallel_tool_calls(folder: Path) -> None:
    """With parallel_tool_calls false, only the first tool call is kept, streamed or not, as in vLLM's server."""
    form = FORMATS[0]
    kit = kit_for(folder, form)
    ids = encode(folder, form.output)
    for is_whole in (False, True):
        parts = joined(run(kit, opening([1], is_whole=is_whole, parallel_tool_calls=False), [ids]))
        assert called(parts) == [CALLS[0]]


def test_reasoning_tokens_are_counted_at_the_end(folder: Path) -> None:
    """The last output has vLLM's count of the reasoning tokens, and earlier outputs have none."""
    form = next(form for form in FORMATS if form.name == "hermes+qwen3")
    kit = kit_for(folder, form)
    ids = encode(folder, form.output)
    steps = run(kit, opening_for(form, prompt_ids(folder, form)), [[token] for token in ids])
    end = ids.index(encode(folder, "</think>")[0])
    assert [step.reasoning_tokens for step in steps[:-1]] == [0] * (len(ids) - 1)
    assert steps[-1].reasoning_tokens == end
    assert run(kit, opening_for(form, prompt_ids(folder, form), is_whole=True), [ids])[0].reasoning_tokens == end


def test_the_text_of_a_stop_token_is_no_output(folder: Path) -> None:
    """A stop token that has ended the output adds no text. The same token elsewhere in the output adds its text."""
    form = FORMATS[0]
    kit = kit_for(folder, form)
    ids = encode(folder, "Hello<|im_end|>")
    assert joined(run(kit, opening([1]), [ids], wire.STOPPED)) == [(PartKind.CONTENT, "Hello", 0)]
    assert joined(run(kit, opening([1]), [ids], wire.ENDED)) == [(PartKind.CONTENT, "Hello<|im_end|>", 0)]


def test_a_forced_call_has_a_grammar_that_begins_after_the_reasoning(folder: Path) -> None:
    """With the tool choice `required`, the output must follow a grammar (a structural tag). The grammar applies once
    the reasoning has ended, or at once if there is no reasoning. With the tool choice `auto` there is no grammar."""
    form = next(form for form in FORMATS if form.name == "hermes+qwen3")
    kit = kit_for(folder, form)
    _, forced = kit.open(opening_for(form, prompt_ids(folder, form), tool_choice="required"))
    assert forced.grammar is not None
    assert forced.grammar.kind == "structural_tag"
    assert forced.reasoning_ended is False
    thought = [*prompt_ids(folder, form), *encode(folder, "</think>")]
    assert kit.open(opening(thought, tool_choice="required"))[1].reasoning_ended is True
    hidden = opening(prompt_ids(folder, form), tool_choice="required", include_reasoning=False)
    assert kit.open(hidden)[1].reasoning_ended is True
    assert kit.open(opening(thought))[1] == wire.Opened(1)


def test_mistrals_parser_makes_no_lark_grammar(folder: Path) -> None:
    """With Mistral's parser and a tokenizer in transformers' form, no grammar in the language Lark is made. A
    request with optional tool calls gets no grammar, and a JSON schema of the caller is not replaced.

    A request that forces a tool call is refused, since the call would be shown as content.
    """
    form = next(form for form in FORMATS if form.name == "mistral")
    kit = kit_for(folder, form)
    session, opened = kit.open(opening_for(form, [1]))
    assert session is not None
    assert opened.grammar is None
    schema = wire.GrammarText("json_schema", '{"type": "object"}')
    message = msgspec.structs.replace(opening_for(form, [1], tool_choice="none", tools=[]), grammar=schema)
    assert kit.open(message)[1].grammar is None, "the caller's grammar stays"
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        session, opened = kit.open(opening_for(form, [1], tool_choice=choice))
        assert session is None
        assert (opened.field, "use tool_choice auto" in opened.error) == ("tool_choice", True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tools": 3}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": 3}}]}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "unknown"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ],
)
def test_a_wrong_request_is_refused_by_field(folder: Path, changes: dict[str, Any], field: str) -> None:
    """A request that vLLM refuses opens no session, and the refusal names the field."""
    session, opened = kit_for(folder, FORMATS[0]).open(opening([1], **changes))
    assert session is None
    assert opened.field == field
    assert opened.error
