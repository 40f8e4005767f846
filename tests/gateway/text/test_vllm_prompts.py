"""A body of /v1/chat/completions or /v1/messages gives the same prompt as in vLLM's server."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.apis.anthropic.requests import parse_messages
from cluster.gateway.apis.openai.fields import read_object
from cluster.gateway.apis.openai.requests import parse_chat
from cluster.gateway.calls.request import ChatPrompt
from cluster.gateway.text.chat.content_format import takes_parts
from cluster.gateway.text.chat.template import ChatTemplate
from tests.gateway.text.kinds import Kind, with_template

pytestmark = pytest.mark.slow

PUBLIC = Path(__file__).parents[2] / "data" / "chat_templates"
SOURCES = {path.stem: path.read_text() for path in PUBLIC.glob("*.jinja")}
OWN = {
    "everything": "{{ messages | tojson }}{{ [tools, documents] | tojson }}{{ enable_thinking }}{{ effort }}",
    "in parts": "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{{ part | tojson }}{% endfor %}|"
    "{{ m | tojson }}{% endfor %}",
    "a developer": "{% for m in messages %}{{ m['role'] == 'developer' }}{{ m | tojson }}{% endfor %}",
}
FORMATS = {
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "attribute": "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
    "item": "{% for m in messages %}{% for c in m['content'] %}{% endfor %}{% endfor %}",
    "filtered": "{% for m in messages[1:] | list %}{% for c in m.content | reverse %}{% endfor %}{% endfor %}",
    "alias": "{% set l = messages %}{% set k = l[1:] %}"
    "{% for m in k %}{% for c in m.content %}{% endfor %}{% endfor %}",
    "self": "{% set messages = messages[1:] %}{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
    "variable": "{% for m in messages %}{% set content = m.content %}{% for c in content %}{% endfor %}{% endfor %}",
    "other variable": "{% for m in messages %}{% set x = m.content %}{% for c in x %}{% endfor %}{% endfor %}",
    "macro": "{% macro f(x) %}{% for c in x %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(m.content) }}{% endfor %}",
    "macro by name": "{% macro f(a, x) %}{% for c in x %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(1, x=m['content']) }}{% endfor %}",
    "macro without content": "{% macro f(content) %}{% for c in content %}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ f(m.tools) }}{% endfor %}",
    "macro unused": "{% macro f(content) %}{% for c in content %}{% endfor %}{% endmacro %}",
    "namespace": "{% set ns = namespace(l=1) %}{% set ns.l = messages %}"
    "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
    "tuple": "{% for i, m in messages %}{% endfor %}"
    "{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}",
    "loop over other": "{% for t in tools %}{% for c in t.content %}{% endfor %}{% endfor %}",
}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Zürich", "東京"]}},
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"parameters": SCHEMA, "name": "weather", "description": "The <weather> & more"}},
    {"function": {"name": "now", "description": "", "parameters": {}, "strict": True, "x": 1}, "defer_loading": False},
]
BARE = [{"function": {"name": "noop"}}]
TEXTS = st.sampled_from(
    ["", "Hi", " <b>é 東京</b> \n", "x-anthropic-billing-header: cch=1\nBe brief.", "<think>a</think>b"]
)
PARTS = st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXTS), max_size=3)
ARGUMENTS = st.sampled_from(["", "{}", '{"city": "Zürich", "n": [1, null]}', "[1]", "no JSON", '{"a"', "null", '"x"'])
CALLS = st.lists(
    st.builds(
        lambda id_, arguments: {"type": "function", "id": id_, "function": {"name": "weather", "arguments": arguments}},
        st.sampled_from(["abcdef123", "1"]),
        ARGUMENTS,
    ),
    max_size=2,
)


def message(role: str, **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for messages of a role."""
    names = {"content": TEXTS | PARTS, "name": st.sampled_from(["bob", ""])}
    return st.fixed_dictionaries({"role": st.just(role)}, optional=names | optional)


ASSISTANTS = message(
    "assistant",
    content=st.none() | TEXTS | PARTS,
    tool_calls=CALLS,
    reasoning_content=TEXTS,
    reasoning=st.none() | TEXTS,
)
ANSWERS = message("tool", tool_call_id=st.sampled_from(["abcdef123", "1"]))
MESSAGES = st.lists(
    message("user") | ASSISTANTS | ANSWERS | message("system") | message("developer"), min_size=1, max_size=5
)
BODIES = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": MESSAGES},
    optional={
        "tools": st.sampled_from([TOOLS, BARE]),
        "documents": st.just([{"text": "A fact.", "title": "One"}]),
        "reasoning_effort": st.sampled_from(["none", "low", "high"]),
        "chat_template_kwargs": st.sampled_from(
            [
                {},
                {"enable_thinking": False},
                {"enable_thinking": None, "effort": "auto"},
                {"reasoning_effort": "medium"},
            ]
        ),
        "add_generation_prompt": st.just(False),
    },
)
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "How is"}, {"type": "text", "text": "the weather?"}]},
    {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [
        {"type": "function", "id": "abcdef123", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}]},
    {"role": "tool", "content": [{"type": "text", "text": '{"sky": "blue"}'}], "tool_call_id": "abcdef123"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And tomorrow?"},
]  # fmt: skip
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "a tool was called": {"messages": TURNS, "tools": TOOLS},
    "without tools": {"messages": TURNS},
    "a tool with only a name": {"messages": TURNS, "tools": BARE},
    "an answer without its call": {"messages": [TURNS[1], TURNS[3]], "tools": TOOLS},
    "documents": {"messages": TURNS[:2], "documents": [{"title": "One", "text": "A fact."}], "tools": TOOLS},
    "only documents": {"messages": TURNS[:2], "documents": [{"title": "One", "text": "A fact."}]},
    "a developer": {"messages": [TURNS[1], {"role": "developer", "content": "Now in French."}, TURNS[0], TURNS[5]]},
    "no thinking": {"messages": TURNS[:2], "reasoning_effort": "none"},
    "an effort": {"messages": TURNS, "reasoning_effort": "high", "tools": TOOLS},
    "to be continued": {"messages": TURNS[:5], "continue_final_message": True, "add_generation_prompt": False},
}


def theirs(body: Mapping[str, Any], tokenizer: Any, source: str) -> str | None:
    """Return the prompt that vLLM's server renders; None for an error."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    return rendered(ChatCompletionRequest.model_validate(json.loads(json.dumps(body))), tokenizer, source)


def theirs_of_messages(body: Mapping[str, Any], tokenizer: Any, source: str) -> str | None:
    """Return the prompt that vLLM's server renders from a body of /v1/messages; None for an error."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

    request = Serving.to_chat_completion_request(
        AnthropicMessagesRequest.model_validate(json.loads(json.dumps(body))),
        merge_inline_system=_merges(source),
    )
    return rendered(request, tokenizer, source)


@functools.cache
def _merges(source: str) -> bool:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages as Serving

    return bool(Serving._detect_merge_inline_system(source))


def rendered(request: Any, tokenizer: Any, source: str) -> str | None:
    """Return the prompt that vLLM's server renders from its own form of a request; None for an error."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.chat_utils import parse_chat_messages
    from vllm.renderers.hf import resolve_chat_template_content_format, safe_apply_chat_template

    config: Any = SimpleNamespace(
        enable_prompt_embeds=False,
        multimodal_config=None,
        revision=None,
        code_revision=None,
        trust_remote_code=False,
    )
    tools = None if request.tools is None else [tool.model_dump() for tool in request.tools]
    defaults = {"tokenize": False} | ({} if tools is None else {"tools": tools})
    params = request.build_chat_params(source, "auto").with_defaults(defaults)
    arguments = params.get_apply_chat_template_kwargs()
    form = resolve_chat_template_content_format(source, tools, "auto", tokenizer, model_config=config)
    messages, _, _ = parse_chat_messages(request.messages, config, form)
    try:
        return str(safe_apply_chat_template(config, tokenizer, messages, **arguments))
    except VLLMValidationError:
        return None


def ours(body: Mapping[str, Any], render: Callable[..., str]) -> str | None:
    """Return the prompt that the gateway makes of a request body; None if the chat template raises an error."""
    parse = parse_messages if "max_tokens" in body else parse_chat
    prompt = parse(read_object(json.dumps(body).encode())).requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    try:
        return render(prompt.messages, **prompt.template_options)
    except CallError:
        return None


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_prompts_equal_vllms(kinds: dict[str, Kind], name: str) -> None:
    """For each public template, the ids of chats with tools, tool results, documents, reasoning and developer messages
    equal vLLM's."""
    kind = kinds["mistral"]
    model, rendered = with_template(kind, {"default": SOURCES[name]}), 0
    for title, fields in CONVERSATIONS.items():
        body = {"model": "m", **fields}
        expected = theirs(body, kind.theirs, SOURCES[name])
        assert ours(body, model.codec.render_chat) == expected, title
        if expected is not None:
            prompt = parse_chat(read_object(json.dumps(body).encode())).requests[0].prompt
            ids = kind.theirs.encode(expected, add_special_tokens=False)
            assert isinstance(prompt, ChatPrompt)
            assert model.codec.encode_chat(prompt.messages, **prompt.template_options) == ids, title
            rendered += 1
    assert rendered >= 4


@settings(max_examples=40, deadline=None)
@given(BODIES)
def test_any_body_gives_vllms_prompt(kinds: dict[str, Kind], body: dict[str, Any]) -> None:
    """For any body and any template, the gateway makes the same prompt as vLLM, or both fail. Three of the templates
    print all their inputs."""
    tokenizer = kinds["mistral"].theirs
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    for name, source in (SOURCES | OWN).items():
        template = _template(source, tuple(special.items()))
        assert ours(body, template.render) == theirs(body, tokenizer, source), name


PROBED = SOURCES | {name: source for name, source in OWN.items() if name != "everything"}
"""Templates without those on which vLLM's probe for late system messages fails."""
HEADER: dict[str, Any] = {"type": "text", "text": "x-anthropic-billing-header: cch=1"}
BLOCKS = st.lists(
    st.sampled_from(["Be brief.", " <b>é 東京</b> \n"]).map(lambda text: {"type": "text", "text": text})
    | st.just(HEADER),
    max_size=3,
)
SYSTEM = TEXTS | BLOCKS
MESSAGES_TOOLS: list[dict[str, Any]] = [{"name": "weather", "description": "d", "input_schema": SCHEMA}]
USE: dict[str, Any] = {"type": "tool_use", "id": "abcdef123", "name": "weather", "input": {"city": "Zürich"}}
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "abcdef123", "content": "blue"}
EXCHANGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}],
    [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}],
]
MESSAGES_TURNS: st.SearchStrategy[list[dict[str, Any]]] = st.sampled_from(EXCHANGES) | st.lists(
    BLOCKS.map(lambda blocks: {"role": "system", "content": blocks}), max_size=2
)
MESSAGES_BODIES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "model": st.just("m"),
        "max_tokens": st.just(9),
        "messages": st.lists(MESSAGES_TURNS, max_size=4).map(
            lambda turns: [*(message for turn in turns for message in turn), {"role": "user", "content": "Now?"}]
        ),
    },
    optional={
        "system": SYSTEM,
        "tools": st.just(MESSAGES_TOOLS),
        "output_config": st.just({"effort": "high"}),
    },
)


@settings(max_examples=15, deadline=None)
@given(MESSAGES_BODIES)
def test_any_body_of_messages_gives_vllms_prompt(kinds: dict[str, Kind], body: dict[str, Any]) -> None:
    """For any body of /v1/messages, every template gives vLLM's prompt, or both fail."""
    tokenizer = kinds["mistral"].theirs
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token")}
    for name, source in PROBED.items():
        template = _template(source, tuple(special.items()))
        assert ours(body, template.render) == theirs_of_messages(body, tokenizer, source), name


@pytest.mark.parametrize("name", sorted(PROBED))
def test_a_late_system_message_is_rendered(kinds: dict[str, Kind], name: str) -> None:
    """A system message after the first message is rendered as in vLLM.

    On /v1/messages this holds for every template: the message stays in its place or is merged into the first system
    message. On OpenAI's API the template gets the message in its place, and may refuse it.
    """
    kind, source = kinds["mistral"], PROBED[name]
    late = {"role": "system", "content": "Now in French."}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}, late]
    fields = {"model": "m", "messages": [*turns, {"role": "user", "content": "Go on"}]}
    body = {**fields, "max_tokens": 9, "system": "Be brief.", "tools": MESSAGES_TOOLS}
    model = with_template(kind, {"default": source})
    prompt = ours(body, model.codec.render_chat)
    assert prompt == theirs_of_messages(body, kind.theirs, source)
    assert prompt is not None
    assert ("Be brief.Now in French." in prompt) == (name in MERGED)
    if name == "qwen3.5":
        assert ours(fields, model.codec.render_chat) is None


MERGED = {"gpt-oss", "mistral-nemo", "mistral-small-3.2", "phi3-training", "qwen3-training", "qwen3.5"}
"""Templates that do not allow a later system message, or of which vLLM finds that."""
_templates: dict[str, ChatTemplate] = {}


def _template(source: str, special: tuple[tuple[str, str], ...]) -> ChatTemplate:
    if source not in _templates:
        _templates[source] = ChatTemplate({"default": source}, special_tokens=dict(special))
    return _templates[source]


@pytest.mark.parametrize("name", [*FORMATS, *SOURCES])
def test_the_content_format_is_vllms(name: str) -> None:
    """For each template, the gateway detects the same content format as vLLM."""
    from vllm.renderers.hf import _detect_content_format, _try_extract_ast

    source = (FORMATS | SOURCES)[name]
    expected = _detect_content_format(source, default="string") == "openai"
    tree = _try_extract_ast(source)
    assert tree is not None
    assert takes_parts(tree) == expected
    if name in ("attribute", "macro by name", "plain", "other variable", "namespace"):
        assert expected == (name in ("attribute", "macro by name")), "both formats are detected"
